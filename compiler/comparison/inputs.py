"""What both engines can be given: whether they take the same inputs, at which sizes, and which samples."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ...errors import DataError, RecipeError, UnknownNameError, UsageError
from ...targets.base import Arrays, Bound, Runner
from ..benchmark import SizedInputs, batch_sizes
from ..data import Batch, as_declared, open_data, random_batch, resized
from ..signature import Signature, TensorSpec
from .place import Place


@dataclasses.dataclass(frozen=True)
class Given:
    """One sample; `labels` are arrays that are no inputs, `probe` tells that it was made up to reach another size."""

    inputs: Arrays
    labels: Arrays = dataclasses.field(default_factory=dict)
    probe: bool = False


def check_alike(a: Signature, b: Signature) -> None:
    """Refuses engines that do not take and give the same: names, ranks, kinds of numbers, sizes in common.

    Raises:
        UsageError: the first thing that differs.
    """
    for what, ours, theirs in (("inputs", a.inputs, b.inputs), ("outputs", a.outputs, b.outputs)):
        if {spec.name for spec in ours} != {spec.name for spec in theirs}:
            raise _unlike(f"have different {what}", _names(ours), _names(theirs))
    for spec in a.inputs:
        other = b.input(spec.name)
        if _kind(spec) != _kind(other) or len(spec.shape) != len(other.shape):
            raise _unlike(
                f"take different inputs {spec.name!r}",
                f"{spec.dtype} {a.describe(spec)}",
                f"{other.dtype} {b.describe(other)}",
            )
        for mine, yours in zip(spec.shape, other.shape, strict=True):
            (low, high), (other_low, other_high) = _range(a, mine), _range(b, yours)
            if max(low, other_low) > min(high, other_high):
                raise _unlike(f"take no size of input {spec.name!r} in common", a.describe(spec), b.describe(other))


def common_sizes(a: Signature, b: Signature, asked: Sequence[Mapping[str, int]] = ()) -> list[dict[str, int]]:
    """The sizes to measure at, by A's names of the dynamic axes: those of either that both take, or those asked for.

    Raises:
        UnknownNameError: an axis that A does not have.
        UsageError: a size that one of them does not take; no size that both take.
    """
    if asked:
        return [_checked(a, b, sizes) for sizes in asked]
    shapes = [a.shapes(sizes) for sizes in batch_sizes(a)] + [b.shapes(sizes) for sizes in batch_sizes(b)]
    found = [sizes for shape in shapes if (sizes := _sizes(a, shape)) is not None and _sizes(b, shape) is not None]
    unique = [dict(items) for items in dict.fromkeys(tuple(sizes.items()) for sizes in found)]
    if not unique:
        raise UsageError(
            "A and B take no size in common that either is measured at",
            expected=_ranges(a),
            found=_ranges(b),
            hint="name a size that both take, for instance --sizes batch=8",
        )
    return sorted(unique, key=lambda sizes: tuple(sizes.values()))


def parse_sizes(text: str) -> dict[str, int]:
    """Reads ``batch=8`` or ``batch=8,dim1=128``.

    Raises:
        RecipeError: text of another form.
    """
    sizes = {}
    for part in text.split(","):
        name, _, size = (word.strip() for word in part.partition("="))
        if not name or not size.isdigit():
            raise RecipeError(f"sizes {text!r} cannot be read", expected="for instance batch=8 or batch=8,dim1=128")
        sizes[name] = int(size)
    return sizes


def sized_inputs(a: Signature, sample: Arrays, sizes: Sequence[Mapping[str, int]]) -> list[SizedInputs]:
    """The sample at each size, as A declares it."""
    first = next((spec.shape[0] for spec in a.inputs if spec.shape), 1)
    made = []
    for at in sizes:
        batch = at[a.batch_axis] if a.batch_axis else int(first)
        made.append(SizedInputs(at, batch, as_declared(resized(a, sample, at), a)))
    return made


@dataclasses.dataclass(frozen=True)
class Samples:
    """Samples that both engines take, read as a stream each time.

    Attributes:
        where: what they are from, in words.
        random: whether they were made up.
    """

    where: str
    read: Callable[[], Iterator[Given]]
    random: bool = False

    def __iter__(self) -> Iterator[Given]:
        return self.read()

    def first(self) -> Given | None:
        """The first one; None where there is none."""
        return next(self.read(), None)


def samples(
    a: Place, b: Place, data: str | None, sizes: Sequence[Mapping[str, int]], *, max_samples: int, seed: int
) -> Samples:
    """What both are run on: the data, or B's record of the reference, or A's, or made-up inputs at `sizes`.

    Raises:
        DataError: no sample fits both.
    """

    def fitting(read: Callable[[], Iterable[Given]], where: str, *, random: bool = False) -> Samples:
        both = (a.signature, b.signature)
        return Samples(where, lambda: (one for one in read() if all(takes(s, one.inputs) for s in both)), random)

    if data is not None:
        found = [fitting(*_from_data(a.signature, b.signature, data, max_samples, seed))]
    else:
        found = [fitting(*_from_record(place, max_samples)) for place in (b, a) if place.bundle]
        found = found or [fitting(*_made_up(a.signature, sizes, seed), random=True)]
    for candidate in found:
        if candidate.first() is not None:
            return candidate
    raise DataError(
        f"no sample of {found[0].where} fits both A and B",
        expected=f"{_ranges(a.signature)} for A, {_ranges(b.signature)} for B",
        hint="give samples that do with --data",
    )


def _from_data(
    a: Signature, b: Signature, data: str, max_samples: int, seed: int
) -> tuple[Callable[[], Iterator[Given]], str]:
    """Data are cut into batches of an optimum that both take, where there is one."""
    cut = next((s for s, other in ((a, b), (b, a)) if _sizes(other, s.shapes()) is not None), a)
    opened = open_data(data, cut, seed=seed)
    return lambda: (
        _split(batch, cut) for batch in itertools.islice(opened.labelled(), max_samples)
    ), opened.description


def _from_record(place: Place, max_samples: int) -> tuple[Callable[[], Iterator[Given]], str]:
    record = place.reference(max_samples)
    assert record is not None
    assert place.bundle is not None
    where = f"the record in {place.bundle.path} ({record.description})"
    return lambda: (Given(sample.inputs, sample.labels, sample.probe) for sample in record), where


def _made_up(
    signature: Signature, sizes: Sequence[Mapping[str, int]], seed: int
) -> tuple[Callable[[], Iterator[Given]], str]:
    def read() -> Iterator[Given]:
        generator = np.random.default_rng(seed)
        return (Given(random_batch(signature, generator, at)) for at in sizes)

    return read, f"random inputs (seed {seed})"


def takes(signature: Signature, inputs: Arrays) -> bool:
    """Whether an engine takes these inputs, but for the width of floating-point numbers, which is adapted."""
    try:
        signature.check(as_declared(inputs, signature))
    except DataError:
        return False
    return True


class Adapted:
    """A runner that is given inputs as another engine takes them: floating-point numbers of another width."""

    def __init__(self, runner: Runner, signature: Signature) -> None:
        self._runner = runner
        self._signature = signature

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs by name."""
        return self._runner.run(as_declared(inputs, self._signature))

    def bind(self, inputs: Arrays) -> Bound:
        """Places inputs on the device; they are adapted once."""
        return self._runner.bind(as_declared(inputs, self._signature))

    def reset(self) -> None:
        """Returns a stateful engine to its first state."""
        self._runner.reset()

    def close(self) -> None:
        """Closes the engine."""
        self._runner.close()


def opened_like(place: Place, like: Signature) -> Runner:
    """Loads an engine to be given what another one takes."""
    runner = place.open()
    same = all(spec.dtype == like.input(spec.name).dtype for spec in place.signature.inputs)
    return runner if same else Adapted(runner, place.signature)


def _checked(a: Signature, b: Signature, asked: Mapping[str, int]) -> dict[str, int]:
    for name in asked:
        if name not in a.axes:
            raise UnknownNameError("dynamic axis", name, a.axes)
    sizes = {**a.sizes(), **asked}
    shapes = a.shapes(sizes)
    for label, signature in (("A", a), ("B", b)):
        if _sizes(signature, shapes) is None:
            text = ", ".join(f"{name}={size}" for name, size in sizes.items())
            raise UsageError(f"{label} does not take {text}", expected=_ranges(signature), found=text)
    return sizes


def _sizes(signature: Signature, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int] | None:
    """The sizes of the dynamic axes that make these shapes; None where the engine does not take them."""
    try:
        return signature.check({s.name: _Shaped(shapes[s.name], s.dtype) for s in signature.inputs})
    except DataError:
        return None


@dataclasses.dataclass(frozen=True)
class _Shaped:
    """What `Signature.check` looks at."""

    shape: tuple[int, ...]
    dtype: str


def _split(batch: Batch, signature: Signature) -> Given:
    names = {spec.name for spec in signature.inputs}
    return Given(
        {name: array for name, array in batch.items() if name in names},
        {name: array for name, array in batch.items() if name not in names},
    )


def _kind(spec: TensorSpec) -> str:
    return "float" if "float" in spec.dtype else spec.dtype


def _range(signature: Signature, dim: int | str) -> tuple[int, int]:
    if isinstance(dim, int):
        return dim, dim
    return signature.axes[dim].min, signature.axes[dim].max


def _ranges(signature: Signature) -> str:
    return ", ".join(f"{spec.name} {signature.describe(spec)}" for spec in signature.inputs)


def _names(specs: Iterable[TensorSpec]) -> str:
    return ", ".join(spec.name for spec in specs)


def _unlike(what: str, a: str, b: str) -> UsageError:
    return UsageError(
        f"A and B {what}, so that they cannot be compared",
        expected=f"{a}, as A",
        found=f"{b}, as B",
        hint="compile the same model with the same inputs; sizes of dynamic axes may differ",
    )
