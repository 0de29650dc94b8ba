"""Sparse attention of decoders: kinds, the graphs that compute them, and which layers take it."""
