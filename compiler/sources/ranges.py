"""Joins the inputs that a file declares with the ranges that the user gives for its dynamic axes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

from ...errors import RecipeError, UnknownNameError
from ..signature import AxisRange, Signature, TensorSpec, check_input_dtype, with_axes

UNSAID = "?"
"""A size that the user said nothing about."""


@dataclasses.dataclass(frozen=True)
class FileInput:
    """An input as its file declares it. A dimension is a size, the name of a dynamic axis, or None (no name)."""

    spec: TensorSpec
    dims: tuple[int | str | None, ...]


def with_ranges(
    declared: Sequence[FileInput],
    user: Signature | None,
    file: str,
    *,
    dynamic: Sequence[str] = (),
    keep_names: bool = True,
) -> Signature:
    """The file's inputs, with every dynamic axis either ranged or fixed as the user says.

    One axis in two inputs needs its range once.

    Args:
        dynamic: ranges of axes, ``name:axis=min..opt..max``, where the user declares no inputs.
        keep_names: axes keep the file's names, else they take the user's.

    Raises:
        UnknownNameError: the user names an input that the file does not have.
        RecipeError: an axis without range or with two, a shape or dtype other than the file's, or bfloat16.
    """
    for item in declared:
        check_input_dtype(item.spec)
    if user is None and dynamic:
        user = with_axes((_unsaid(item) for item in declared), dynamic)
    given = {spec.name: spec for spec in user.inputs} if user else {}
    names = [item.spec.name for item in declared]
    for name in given:
        if name not in names:
            raise UnknownNameError(f"input of {file}", name, names)
    ranged = user.axes if user else {}
    sizes: dict[str, int] = {}
    labels: dict[str, str] = {}
    axes: dict[str, AxisRange] = {}
    for item in declared:
        if (spec := given.get(item.spec.name)) is None:
            continue
        _check(item, spec, file)
        for index, (dim, wanted) in enumerate(zip(item.dims, spec.shape, strict=True)):
            key = _key(item, index)
            if isinstance(dim, int) or wanted == UNSAID:
                continue
            if isinstance(wanted, str):
                label = labels.setdefault(key, dim if keep_names and dim is not None else wanted)
                _same("range", label, axes.setdefault(label, ranged[wanted]), ranged[wanted], spec.name)
            else:
                _same("size", key, sizes.setdefault(key, wanted), wanted, spec.name)
    settled: dict[str, int | str] = {**sizes, **labels}  # a range for one input goes for all that share the axis
    specs = []
    for item in declared:
        shape = tuple(
            dim if isinstance(dim, int) else _settled(item, index, settled, file) for index, dim in enumerate(item.dims)
        )
        specs.append(dataclasses.replace(item.spec, shape=shape))
    return Signature(inputs=tuple(specs), axes=axes)


def _unsaid(item: FileInput) -> TensorSpec:
    return dataclasses.replace(item.spec, shape=tuple(d if isinstance(d, int) else UNSAID for d in item.dims))


def _key(item: FileInput, index: int) -> str:
    dim = item.dims[index]
    return dim if isinstance(dim, str) else f"{item.spec.name}:{index}"


def _same(what: str, axis: str, first: object, second: object, name: str) -> None:
    if first != second:
        raise RecipeError(f"axis {axis!r} has two {what}s", expected=first, found=f"{second} for {name!r}")


def _settled(item: FileInput, index: int, settled: Mapping[str, int | str], file: str) -> int | str:
    key = _key(item, index)
    if key not in settled:
        shape = "x".join(str(d) if isinstance(d, int) else "1" for d in item.dims)
        label = f" ({item.dims[index] or 'without a name'})"
        name = item.spec.name
        raise RecipeError(
            f"axis {index}{label} of input {name!r} is dynamic in {file}, and has no range",
            expected="a range for each dynamic axis, or a fixed size",
            hint=f"pass --dynamic {name}:{index}=1..8..64 for a range, or --input {name}:{shape}:{item.spec.dtype} "
            "for fixed sizes",
        )
    return settled[key]


def _check(item: FileInput, spec: TensorSpec, file: str) -> None:
    declared = "x".join("?" if d is None else str(d) for d in item.dims) or "scalar"
    fits = len(item.dims) == len(spec.shape) and all(
        dim == wanted or not isinstance(dim, int) for dim, wanted in zip(item.dims, spec.shape, strict=True)
    )
    if not fits or item.spec.dtype != spec.dtype:
        raise RecipeError(
            f"input {spec.name!r} is declared otherwise in {file}",
            expected=f"{re.sub(' ', '', declared)}:{item.spec.dtype}",
            found=str(spec).partition(":")[2],
            hint="an axis that is a number in the file cannot be made dynamic; export it again with a dynamic axis",
        )
