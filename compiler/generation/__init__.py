"""Generates text with an engine. Needs NumPy and the engine's runtime only."""
