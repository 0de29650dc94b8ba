"""Batch inference over files: `enginesmith run`. Reading, running and writing overlap, and a run can be continued."""
