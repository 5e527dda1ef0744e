"""The ground floor: everything that knows ONNX. A file comes in as a checked graph, runs as a differentiable torch
module or through onnxruntime, and goes out as an edited copy of the original graph."""
