"""From a model to a bundle: sources, capture, graph, pipeline, validator, benchmark, report, loading."""
