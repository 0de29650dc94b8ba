"""The task's own measure of a good ranking."""

import numpy as np


def auc(outputs: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> np.ndarray:
    """For each row the share of the rows of the other kind that it is ranked right against, ties counting half.

    The mean over the rows with a click is the area under the ROC curve (AUC) of the batch, and so is that over the
    others. `click` travels in test.npz beside the model's inputs.
    """
    (scores,) = outputs.values()
    clicked = inputs["click"] == 1
    right = (np.sign(scores[clicked, None] - scores[None, ~clicked]) + 1) / 2
    if not right.size:
        raise ValueError("a batch needs rows with a click and rows without one")
    shares = np.empty(len(scores))
    shares[clicked], shares[~clicked] = right.mean(axis=1), right.mean(axis=0)
    return shares
