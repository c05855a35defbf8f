"""Attention arithmetic: the plain reference, the Triton kernel held against it, and which of them runs."""
