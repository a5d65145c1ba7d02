"""The engines that hold the parameters and take the optimizer step: plain PyTorch, and DeepSpeed."""
