"""Structured pruning: which positions of which dimensions go, and how what is left makes up for them."""
