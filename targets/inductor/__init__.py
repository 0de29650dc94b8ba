"""The part of the target torch-inductor that runs in a process of its own."""
