"""The task's own measures of a good answer."""

import numpy as np


def accuracy(outputs: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> np.ndarray:
    """For each row, whether the token that follows was guessed right."""
    return outputs["logits"].argmax(axis=1) == inputs["next"]


def log_likelihood(outputs: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> np.ndarray:
    """For each row, ln p of the token that follows: logit - ln(sum of exp(logits)), higher is better.

    Perplexity is exp(-mean), so a budget of metric=0.02 allows exp(0.02) = 1.02 times the perplexity of the reference.
    """
    logits = outputs["logits"].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits[np.arange(len(logits)), inputs["next"]] - np.log(np.exp(logits).sum(axis=1))
