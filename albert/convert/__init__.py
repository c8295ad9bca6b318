"""Checkpoints of other projects in, Hugging Face directories and ONNX out."""
