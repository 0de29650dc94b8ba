"""Memory, streams and sessions on CUDA devices, without torch and without the CUDA toolkit."""
