"""Finds out what the user gave as a model, and loads it. One file here for each kind of source.

A `Model` is the reference: it runs the model as it was given, and every graph and engine is judged against it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from ..signature import Signature

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded model.

    Attributes:
        kind: what it was loaded from.
        reference: runs it.
        signature: names, dtypes, shapes, dynamic axes and nesting; complete once `describe` has run the model.
        module: the torch module whose forward takes the inputs as positional tensors in the signature's order and
            returns a flat tuple in the order of the outputs; None for ONNX sources.
        onnx_path: the file of an ONNX source.
        fingerprint: hash of code, weights and factory arguments, part of the cache's key.
        parameter_bytes: size of the weights.
    """

    kind: Literal["module", "torchscript", "exported-program", "onnx"]
    reference: Reference
    signature: Signature
    module: torch.nn.Module | torch.jit.ScriptModule | None
    onnx_path: Path | None
    fingerprint: str
    parameter_bytes: int


class Reference(Protocol):
    """Runs the model as the user gave it."""

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name, on the host, in the model's own precision."""

    def reset(self) -> None:
        """Returns a stateful model to its first state."""


def load_model(
    source: str | Path | torch.nn.Module,
    *,
    weights: Path | None = None,
    inputs: Signature | None = None,
    arguments: Mapping[str, Any] | None = None,
    device: str = "cpu",
) -> Model:
    """Loads a model from whatever names it."""
    raise NotImplementedError
