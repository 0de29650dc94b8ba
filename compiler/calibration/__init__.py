"""What activations do on real data: statistics in one pass, and the ranges that quantizers and casts take from them."""
