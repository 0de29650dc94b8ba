"""Stages of a pipeline: the line of nodes that is cut, what pieces cost, where to cut, and their graphs."""
