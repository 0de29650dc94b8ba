"""The task's own measure of a right answer."""

import numpy as np


def accuracy(outputs: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> np.ndarray:
    """1 for each row whose digit is right, 0 for the others; `label` travels in test.npz beside the model's input."""
    (logits,) = outputs.values()
    return (logits.argmax(axis=1) == inputs["label"]).astype(np.float64)
