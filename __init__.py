"""enginesmith: from a PyTorch checkpoint to an engine that is proven right and proven faster."""
