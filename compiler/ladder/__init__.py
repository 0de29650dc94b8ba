"""The ladder: finds the best engine of each target, step by step, each kept only where it is measured to pay."""
