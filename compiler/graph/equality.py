"""Whether a rewritten graph computes the same: outputs and tensors in between, at two sizes of each dynamic axis."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from ..data import other_sizes, random_batch, resized
from ..difference import relative_l2
from .graph import Graph
from .probe import Arrays, Tapped, chunks, sizes

if TYPE_CHECKING:
    from ...passes.base import Context

GROUP_BYTES = 256 << 20
"""Tensors in between that are compared in one run."""


def inputs_at_two_sizes(context: Context) -> Iterator[Arrays]:
    """Real values where there are any, at two sizes of each dynamic axis, so that no size is folded in."""
    sample = next(iter(context.samples), None) if context.samples is not None else None
    generator = np.random.default_rng(0)
    signature = context.signature
    for at in (signature.sizes(), *other_sizes(signature)):
        yield random_batch(signature, generator, at) if sample is None else resized(signature, sample, at)


def allowed(array: np.ndarray, tolerance: float) -> float:
    """Relative L2 by which an array may differ: of float16 two of its roundings, of integers nothing."""
    return max(tolerance, 2 * float(np.finfo(array.dtype).eps)) if array.dtype.kind == "f" else 0.0


def excess(
    before: Graph, after: Graph, names: Iterable[str], batches: Iterable[Arrays], tolerance: float
) -> dict[str, tuple[float, bool]]:
    """The largest relative L2 of each tensor and output over the batches, and whether it is more than rounding.

    Args:
        names: tensors that both graphs have.

    Raises:
        GraphError, TargetUnavailableError: one of the graphs cannot be run.
    """
    given = list(batches)
    found: dict[str, tuple[float, bool]] = {}
    for group in chunks(sizes(before, names, given[0]), GROUP_BYTES) or [[]]:
        old, new = Tapped(before, group), Tapped(after, group)
        for inputs in given:
            expected, got = old(inputs), new(inputs)
            for name, array in expected.items():
                difference = relative_l2(got[name], array)
                worst, differs = found.get(name, (0.0, False))
                found[name] = max(worst, difference), differs or not difference <= allowed(array, tolerance)
    return found
