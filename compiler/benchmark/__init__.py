"""Times candidates against each other, interleaved, with the interval of every ratio; torch as their baseline."""

from .rounds import Candidate, Settings, SizedInputs, batch_sizes, benchmark

__all__ = ["Candidate", "Settings", "SizedInputs", "batch_sizes", "benchmark"]
