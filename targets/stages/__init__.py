"""Runs the stages of a pipeline in one process: micro-batches, threads on the host, streams on GPUs."""
