"""What `h100.py` is made of: rows, the peers, enginesmith's engines, and the goals."""
