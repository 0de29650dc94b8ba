"""How rows become batches of an engine: which arrays stack, the sizes that a batch may have, and what a part lacks."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..compiler.signature import Signature
from ..errors import DataError, UnknownNameError, UsageError
from .parts import Part, Spec


class _Header(NamedTuple):
    """As much of an array as `Signature.check` reads."""

    dtype: Any
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """What of the data is read, and how it stacks.

    Attributes:
        stacked: inputs of which each row has its own.
        shared: inputs that a file has once for all its rows.
        keep: arrays of the data that are handed on beside the outputs.
        smallest: rows that a batch has at least; a smaller one is padded.
        largest: rows that a batch has at most.
        usual: rows that the engine was tuned for.
        varying: whether files may differ in the shape of their rows, or in what they share.
    """

    signature: Signature
    stacked: tuple[str, ...]
    shared: tuple[str, ...]
    keep: tuple[str, ...]
    smallest: int
    largest: int
    usual: int
    varying: bool

    def rows(self, part: Part) -> int:
        """Rows of a part.

        Raises:
            DataError: it has none that could be counted.
        """
        found = {n: part.specs[n].shape[0] for n in self.stacked if n in part.specs and part.specs[n].shape}
        if not found:
            raise DataError(
                f"{part.name} has no rows", expected=", ".join(self.stacked), found=", ".join(part.specs) or "nothing"
            )
        return max(found.values())

    def problem(self, part: Part) -> DataError | None:
        """Why the rows of a part do not fit the model; None where they do."""
        specs, rows = part.specs, self.rows(part)
        inputs = {spec.name: specs[spec.name] for spec in self.signature.inputs if spec.name in specs}
        for name in (*self.stacked, *self.keep):
            if name in specs and specs[name].shape[:1] != (rows,):
                return DataError(f"{name!r} has other rows than the rest", expected=rows, found=specs[name].shape)
        if missing := [name for name in self.keep if name not in specs]:
            return DataError(f"{missing[0]!r} is missing, which is to be kept", found=", ".join(specs))
        try:
            self.signature.check({name: self._header(name, spec) for name, spec in inputs.items()})
        except DataError as error:
            return error
        return None

    def key(self, part: Part) -> Hashable:
        """Equal for parts whose rows may share a batch."""
        if not self.varying:
            return ()
        return part.name if self.shared else tuple(part.specs[name].shape[1:] for name in self.stacked)

    def check_batch(self, batch: int) -> None:
        """Refuses a batch that the engine does not take.

        Raises:
            UsageError: it does not.
        """
        if not max(self.smallest, 1) <= batch <= self.largest:
            fixed = self.smallest == self.largest
            raise UsageError(
                f"the engine takes no batch of {batch}",
                expected=self.largest if fixed else f"{self.smallest} to {self.largest}",
                found=batch,
                hint="leave out --batch, or compile the model with another range of its batch (--dynamic)",
            )

    def _header(self, name: str, spec: Spec) -> _Header:
        """As of one batch, whose size is the engine's."""
        shape = (self.smallest, *spec.shape[1:]) if name in self.stacked and spec.shape else spec.shape
        return _Header(spec.dtype, shape)


def layout_of(signature: Signature, *, keep: Sequence[str] = ()) -> Layout:
    """The layout for an engine.

    Raises:
        UsageError: its inputs have no axis for rows, or a kept array is an input.
    """
    axis = signature.batch_axis
    first = axis or next((spec.shape[0] for spec in signature.inputs if spec.shape), None)
    stacked = tuple(spec.name for spec in signature.inputs if spec.shape[:1] == (first,))
    if first is None or not stacked:
        raise UsageError("no input of the engine has an axis along which rows could stack", found=_inputs(signature))
    shared = tuple(spec.name for spec in signature.inputs if spec.name not in stacked)
    if clash := [name for name in keep if name in (*stacked, *shared)]:
        raise UsageError(f"{clash[0]!r} is an input and lies in the data already", hint="leave out --keep for it")
    sizes = signature.axes[axis] if axis else None
    free = any(isinstance(dim, str) and dim != axis for spec in signature.inputs for dim in spec.shape)
    return Layout(
        signature,
        stacked,
        shared,
        tuple(keep),
        smallest=sizes.min if sizes else int(first),
        largest=sizes.max if sizes else int(first),
        usual=sizes.opt if sizes else int(first),
        varying=free or bool(shared),
    )


def choose_outputs(signature: Signature, only: Sequence[str], keep: Sequence[str] = ()) -> tuple[str, ...]:
    """The outputs that are written: all, or those in `only`, in the engine's order.

    Raises:
        UnknownNameError: the engine has no such output.
        UsageError: an output has no axis for rows, or the name of a kept array.
    """
    names = [spec.name for spec in signature.outputs]
    for name in only:
        if name not in names:
            raise UnknownNameError("output", name, names)
    axis = signature.batch_axis
    first = axis or next((spec.shape[0] for spec in signature.inputs if spec.shape), None)
    chosen = [spec for spec in signature.outputs if not only or spec.name in only]
    if clash := [spec.name for spec in chosen if spec.name in keep]:
        raise UsageError(f"{clash[0]!r} is an output and an array to keep", hint="rename it in the data, or use --only")
    for spec in chosen:
        if spec.shape[:1] not in ((first,), ("?",)):
            raise UsageError(
                f"output {spec.name!r} has no axis for rows, so what it says of each row cannot be told",
                expected=f"({first}, ...)",
                found=spec,
                hint="name other outputs with --only, or run the engine from Python (enginesmith.load)",
            )
    return tuple(spec.name for spec in chosen)


def zeros(layout: Layout) -> Mapping[str, np.ndarray]:
    """The smallest batch, of zeros, at the optimum of the other axes."""
    axis = layout.signature.batch_axis
    shapes = layout.signature.shapes({axis: layout.smallest} if axis else {})
    return {name: np.zeros(shape, layout.signature.input(name).dtype) for name, shape in shapes.items()}


def _inputs(signature: Signature) -> str:
    return ", ".join(map(str, signature.inputs)) or "none"
