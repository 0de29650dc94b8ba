"""A small LSTM that guesses the next character of English prose."""

import torch
from torch import nn

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
"""Newline and the printable characters of ASCII; a token is an index into it."""


class Characters(nn.Module):
    """Tokens (batch, time) become the logits (batch, time, 96) of the character that follows each."""

    def __init__(self, hidden: int = 192) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(ALPHABET), 64)
        self.lstm = nn.LSTM(64, hidden, batch_first=True)
        self.head = nn.Linear(hidden, len(ALPHABET))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        states, _ = self.lstm(self.embedding(tokens))
        return self.head(states)


def characters() -> nn.Module:
    """What `model: model.py:characters` in the recipe names."""
    return Characters()
