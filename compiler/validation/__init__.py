"""Judges engines: metrics, tolerances, the record of the reference, Polygraphy's formats."""
