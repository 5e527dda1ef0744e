"""What helps when an operator cannot be converted."""

from __future__ import annotations

INTEGER_KERNELS = ("QLinear", "QGemm", "QAttention", "ConvInteger", "MatMulInteger", "DynamicQuantize", "NhwcMaxPool")
LOOPS = ("Loop", "Scan", "LSTM", "GRU", "RNN", "SequenceMap")


def what_helps(op: str, domain: str = "") -> str:
    """A sentence's end that says what to do about an operator without a converter."""
    if op.startswith(INTEGER_KERNELS):
        return "give the float model, or one quantized in the Q/DQ form"
    if op == "If":
        return "export the model in evaluation mode for one input size, so that the branch is settled"
    if op in LOOPS:
        return "export the model without loops and recurrent parts"
    if domain == "com.microsoft":
        return "give the model as it was before onnxruntime optimised it"
    return "export the model without it"
