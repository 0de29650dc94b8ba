"""From a bundle to a service: a Triton Inference Server run on it, and what watches, calls and measures that server."""
