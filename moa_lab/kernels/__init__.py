"""Attention: the plain PyTorch reference, the Triton kernels tested against it, and the choice between them."""
