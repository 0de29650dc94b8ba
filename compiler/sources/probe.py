"""Runs a torch model to learn what it gives: names, dtypes, nesting, which output dimension is which axis, state."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import ml_dtypes  # noqa: F401  teaches NumPy the name bfloat16
import numpy as np

from ...errors import SourceError
from ..data import random_batch
from ..signature import Signature, TensorSpec
from .reference import TorchReference, to_array

SAME = 1e-5
"""Relative L2 within which two runs are the same; devices may add in another order."""


def resized(sample: Mapping[str, np.ndarray], signature: Signature, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """A sample with its dynamic axes repeated or cut to these sizes."""
    arrays = {}
    for spec in signature.inputs:
        array = np.asarray(sample[spec.name])
        for axis, size in enumerate(signature.shapes(sizes)[spec.name]):
            if array.shape[axis] != size:
                array = np.take(array, np.arange(size) % array.shape[axis], axis=axis)
        arrays[spec.name] = np.asarray(array, order="C")
    return arrays


def other_sizes(signature: Signature) -> list[dict[str, int]]:
    """For each dynamic axis with more than one size, sizes that differ from the optimum in that axis alone."""
    found = []
    for name, axis in signature.axes.items():
        other = axis.min if axis.min < axis.opt else axis.opt + 1
        if other in axis:
            found.append({**signature.sizes(), name: other})
    return found


def relative_l2(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    """The largest ||found - expected|| / ||expected|| of any output; infinite where shapes, NaN or Inf differ."""
    worst = 0.0
    for name, want in expected.items():
        got = found[name]
        if got.shape != want.shape:
            return float("inf")
        a, b = got.astype(np.float64).ravel(), want.astype(np.float64).ravel()
        finite = np.isfinite(b)
        if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(a[finite]).all():
            return float("inf")
        difference = float(np.linalg.norm(a[finite] - b[finite]))
        # an output of zeros has no norm to compare with: 1e-6 an element stands in for it
        worst = max(worst, difference / max(float(np.linalg.norm(b[finite])), 1e-6 * np.sqrt(max(b.size, 1))))
    return worst


def describe(
    reference: TorchReference, inputs: Signature, sample: Mapping[str, np.ndarray] | None
) -> tuple[Signature, bool]:
    """The complete signature, and whether the model carries state from one call to the next.

    Raises:
        SourceError: the model fails, returns other things than tensors, or gives other values each time.
    """
    first = _inputs(inputs, sample, inputs.sizes())
    tensors, structure = reference.outputs(first)
    stateful = _is_stateful(reference, first, {name: to_array(tensor) for name, tensor in tensors.items()})
    points = [inputs.sizes(), *other_sizes(inputs)]
    shapes = {name: [tuple(tensor.shape)] for name, tensor in tensors.items()}
    for sizes in points[1:]:
        reference.reset()
        found, _ = reference.outputs(_inputs(inputs, sample, sizes))
        if set(found) != set(shapes):
            raise SourceError(
                f"the outputs of the model depend on the sizes of its inputs, here {sizes}",
                expected=", ".join(shapes),
                found=", ".join(found),
            )
        for name, tensor in found.items():
            shapes[name].append(tuple(tensor.shape))
    specs = (
        TensorSpec(name, str(tensor.dtype).removeprefix("torch."), _dimensions(shapes[name], points))
        for name, tensor in tensors.items()
    )
    reference.reset()
    if not stateful:
        reference.keep()
    return dataclasses.replace(inputs, outputs=tuple(specs), structure=structure), stateful


def _inputs(
    signature: Signature, sample: Mapping[str, np.ndarray] | None, sizes: Mapping[str, int]
) -> dict[str, np.ndarray]:
    return (
        resized(sample, signature, sizes)
        if sample is not None
        else random_batch(signature, np.random.default_rng(0), sizes)
    )


def _is_stateful(reference: TorchReference, inputs: Mapping[str, np.ndarray], first: Mapping[str, np.ndarray]) -> bool:
    if relative_l2(reference.run(inputs), first) <= SAME:
        return False
    reference.reset()
    if (difference := relative_l2(reference.run(inputs), first)) <= SAME:
        return True
    raise SourceError(
        "the model gives other outputs each time it runs on the same inputs, so that no engine can be compared with it",
        expected="a model without random numbers, whose state can be copied",
        found=f"relative difference {difference:.2g} between two runs from the first state",
        hint="look for dropout that ignores eval(), and for torch.rand in forward",
    )


def _dimensions(shapes: Sequence[tuple[int, ...]], points: Sequence[Mapping[str, int]]) -> tuple[int | str, ...]:
    """Names each dimension by the axis whose size it always has; ``?`` where it is neither that nor constant."""
    if len({len(shape) for shape in shapes}) > 1:
        raise SourceError("the rank of an output depends on the sizes of the inputs", found=list(shapes))
    dimensions: list[int | str] = []
    for found in zip(*shapes, strict=True):
        same = [axis for axis in points[0] if list(found) == [sizes[axis] for sizes in points]]
        constant = len(set(found)) == 1
        dimensions.append(found[0] if constant else same[0] if same else "?")
    return tuple(dimensions)
