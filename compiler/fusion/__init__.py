"""Several nodes as one: attention, GELU, LayerNormalization and embedding tables, found by how they are written."""
