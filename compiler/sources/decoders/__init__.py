"""Decoders: causal language models with their cache, as ordinary models whose calls states.py describes."""
