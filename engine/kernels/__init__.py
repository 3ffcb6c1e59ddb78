"""The arithmetic of one operation: plain PyTorch, Triton, and which one a device gets."""
