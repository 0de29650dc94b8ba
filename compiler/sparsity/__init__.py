"""Sparsity that kernels can use: the 2:4 pattern, which layers it is for, and which weights go."""
