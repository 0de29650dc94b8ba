"""A small residual network that reads handwritten digits."""

import torch
from torch import nn


class ConvNorm(nn.Sequential):
    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(channels_in, channels_out, kernel_size=3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
        )


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = ConvNorm(channels, channels)
        self.second = ConvNorm(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.second(torch.relu(self.first(x))))


class Digits(nn.Module):
    """Images (batch, 1, 8, 8) with values from 0 to 1 become the logits (batch, 10) of the digits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(1, 32)
        self.low = Residual(32)
        self.down = ConvNorm(32, 64, stride=2)
        self.high = Residual(64)
        self.head = nn.Linear(64, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.low(torch.relu(self.stem(image)))
        x = self.high(torch.relu(self.down(x)))
        return self.head(x.mean(dim=(2, 3)))


def digits() -> nn.Module:
    """What `model: model.py:digits` in the recipe names."""
    return Digits()
