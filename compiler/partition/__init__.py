"""Stages of a pipeline: the line of nodes that is cut, what each piece costs, where to cut, and the graphs of stages."""
