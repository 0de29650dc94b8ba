"""Finds the batch sizes of an engine: the largest that fits in memory, where throughput saturates, the best in time."""
