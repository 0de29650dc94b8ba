"""A row of the table: one model at one batch size, with its inputs, its reference and its folder of built files."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from measured import MODELS, Measured

from enginesmith.compiler.difference import relative_l2
from enginesmith.compiler.signature import parse_inputs
from enginesmith.compiler.sources import Model, load_model
from enginesmith.compiler.validation.metrics import TOLERANCES
from enginesmith.targets.base import Runner

SAMPLES = {1: 32, 32: 64, 256: 1024, 2048: 4096}
"""Samples to calibrate and to validate with, by batch."""

FP16_BUDGET = TOLERANCES["fp16"]["relative_l2"]
"""Relative L2 against torch in fp32 up to which a candidate counts as right."""


@dataclasses.dataclass(frozen=True)
class Row:
    """All candidates of a row have inputs of the same fixed shapes, so that each may be built for just these."""

    model: str
    batch: int
    device: str
    work: Path

    @property
    def name(self) -> str:
        return f"{self.model} b{self.batch}"

    @property
    def measured(self) -> Measured:
        return MODELS[self.model]

    @property
    def half(self) -> str:
        """The precision of most candidates: on a CPU, where a run only shows that all works, there is no fp16."""
        return "fp16" if self.device == "cuda" else "fp32"

    @property
    def folder(self) -> Path:
        return self.work / f"{self.model}-b{self.batch}"

    @property
    def inputs(self) -> list[str]:
        """As `--input` takes them, with the batch in place of the 1."""
        return [text.replace(":1x", f":{self.batch}x", 1) for text in self.measured.inputs]

    @property
    def data(self) -> Path:
        """Samples for calibration and validation."""
        return self.folder / "data.npz"

    @cached_property
    def loaded(self) -> Model:
        return load_model(self.measured.source, inputs=parse_inputs(self.inputs))

    @property
    def sample(self) -> dict[str, np.ndarray]:
        """The inputs that are measured."""
        with np.load(self.data, allow_pickle=False) as file:
            return {name: file[name][: self.batch] for name in file}

    def prepare(self) -> None:
        """Writes the data, and what torch in fp32 on the CPU makes of the first batch of them."""
        np.savez(self.data, **self.measured.arrays(max(self.batch, SAMPLES.get(self.batch, 4 * self.batch))))
        np.savez(self.folder / "reference.npz", **self.loaded.reference.run(self.sample))

    def error(self, runner: Runner) -> float:
        """Relative L2 of an engine's outputs against torch in fp32, the worst output deciding."""
        found = runner.run(self.sample)
        with np.load(self.folder / "reference.npz", allow_pickle=False) as file:
            expected = {name: file[name] for name in file}
        return max(relative_l2(_array(found[name]).astype(array.dtype), array) for name, array in expected.items())


def _array(value: object) -> np.ndarray:
    return value.cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
