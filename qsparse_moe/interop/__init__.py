"""Trained models in files that other programs open, and back; owner of safetensors and of transformers' checkpoints."""
