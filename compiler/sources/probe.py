"""Runs a torch model to learn what it gives: names, dtypes, nesting, which output dimension is which axis, state."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from ...errors import SourceError
from ..data import other_sizes, random_batch, resized
from ..difference import worst_relative_l2
from ..signature import Signature, TensorSpec
from .reference import TorchReference, to_array

SAME = 1e-5
"""Relative L2 within which two runs are the same; devices may add in another order."""


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
        resized(signature, sample, sizes)
        if sample is not None
        else random_batch(signature, np.random.default_rng(0), sizes)
    )


def _is_stateful(reference: TorchReference, inputs: Mapping[str, np.ndarray], first: Mapping[str, np.ndarray]) -> bool:
    if worst_relative_l2(reference.run(inputs), first) <= SAME:
        return False
    reference.reset()
    if (difference := worst_relative_l2(reference.run(inputs), first)) <= SAME:
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
