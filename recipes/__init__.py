"""The craft: how images and smaller models are made. Knows torch and objectives; never sees ONNX or the terminal."""
