"""Sizes that Tensor Cores take: which dimensions to grow, what the new positions hold, and what is gained."""
