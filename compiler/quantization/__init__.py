"""Integer arithmetic in a graph: parameters, QuantizeLinear and DequantizeLinear, placement, and accuracy repairs."""
