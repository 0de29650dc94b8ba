"""A small recommender: the probability of a click on what was shown."""

import itertools

import torch
from torch import nn

NUMBERS = 13
SIZES = (600, 400, 100, 60, 50, 24, 12, 7)
"""Numbers of an impression, and the sizes of its categories, as `clicks.py` makes them."""


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class Recommender(nn.Module):
    """Numbers (batch, 13) and categories (batch, 8) become the probability (batch,) of a click.

    As in DLRM: an MLP makes a row of the numbers, tables have one for each category, and a second MLP reads these rows
    and the products of all pairs.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size, width) for size in SIZES)
        self.bottom = mlp(NUMBERS, 64, width)
        rows = len(SIZES) + 1
        pairs = torch.tril_indices(rows, rows, -1)
        self.register_buffer("pairs", pairs[0] * rows + pairs[1])
        self.top = mlp(width * rows + pairs.shape[1], 128, 64, 1)[:-1]

    def forward(self, numbers: torch.Tensor, categories: torch.Tensor) -> torch.Tensor:
        rows = [self.bottom(numbers)] + [table(categories[:, place]) for place, table in enumerate(self.tables)]
        stacked = torch.stack(rows, 1)
        products = torch.bmm(stacked, stacked.transpose(1, 2)).flatten(1)[:, self.pairs]
        return torch.sigmoid(self.top(torch.cat([stacked.flatten(1), products], 1))).squeeze(1)


def recommender() -> nn.Module:
    """What `model: model.py:recommender` in the recipe names."""
    return Recommender()
