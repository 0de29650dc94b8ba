"""How statistics are collected."""

from __future__ import annotations

import dataclasses

from ...errors import RecipeError


@dataclasses.dataclass(frozen=True)
class CalibrationSettings:
    """What to run, and how.

    Attributes:
        max_samples: stop after the batch that reaches this many samples (rows of the inputs); None for all data.
        momentum: weight of a new batch in the moving average of the extremes, 0.01 in ONNX Runtime and torch.
        allow_random: take inputs that were made up because there was no data.
        seed: of the choice of the elements that go into histograms.
        threads: of ONNX Runtime, 0 for one a physical core.
    """

    max_samples: int | None = 512
    momentum: float = 0.01
    allow_random: bool = False
    seed: int = 0
    threads: int = 0

    def __post_init__(self) -> None:
        if self.max_samples is not None and self.max_samples < 1:
            raise RecipeError("calibration needs samples", expected="max_samples >= 1", found=self.max_samples)
        if not 0 < self.momentum <= 1:
            raise RecipeError("momentum is out of range", expected="0 < momentum <= 1", found=self.momentum)
