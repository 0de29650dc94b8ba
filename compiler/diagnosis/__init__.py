"""Diagnosis: where the time of a model or an engine goes, what limits it, and what would help."""
