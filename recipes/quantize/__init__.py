"""Post-training quantization by nearest rounding and by layer or block reconstruction."""
