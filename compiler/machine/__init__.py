"""What this machine is, what an engine needs of it, and whether the targets work on it."""
