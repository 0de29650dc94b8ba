"""How statistics are collected."""

from __future__ import annotations

import dataclasses

from ...errors import RecipeError


@dataclasses.dataclass(frozen=True)
class CalibrationSettings:
    """What to run, and how much memory it may take.

    Attributes:
        max_samples: stop after the batch that reaches this many samples (rows of the inputs); None for all data.
        momentum: weight of a new batch in the moving average of the extremes, 0.01 in ONNX Runtime and torch.
        allow_random: take inputs that were made up because there was no data.
        seed: of the choice of the elements that go into histograms.
        threads: of ONNX Runtime and of the statistics, 0 for one a physical core.
        memory_mib: what the observed tensors of one run may hold. Where they are larger, dynamic batches are run in
            parts; where that is not possible, the tensors are observed in groups, each in a pass of its own.
    """

    max_samples: int | None = 512
    momentum: float = 0.01
    allow_random: bool = False
    seed: int = 0
    threads: int = 0
    memory_mib: int = 256

    def __post_init__(self) -> None:
        if self.max_samples is not None and self.max_samples < 1:
            raise RecipeError("calibration needs samples", expected="max_samples >= 1", found=self.max_samples)
        if not 0 < self.momentum <= 1:
            raise RecipeError("momentum is out of range", expected="0 < momentum <= 1", found=self.momentum)
        if self.memory_mib < 1:
            raise RecipeError("calibration needs memory", expected="memory_mib >= 1", found=self.memory_mib)
