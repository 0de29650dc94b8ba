"""What is sent, and what has to come back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...compiler.engine import ranked, read_manifest
from ...compiler.signature import Signature
from ...compiler.validation.reference import Recorded, ReferenceOutputs
from ...errors import DataError, EngineError, UsageError
from ..probe import limit_of
from ..wire import RemoteModel, arrays, request, response

MESSAGES = 64
"""Different requests that are sent in turn at most."""

VARIANTS = 32
"""Answers to each request that are known to be right, at most: merged with others, it is summed in other orders."""

Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Payload:
    """Requests, and the outputs that are right where they are known.

    Attributes:
        what: in a few words.
        limit: relative L2 that an output may be from what is expected.
        rows: in each request.
    """

    what: str
    messages: tuple[Any, ...]
    expected: tuple[Arrays, ...] = ()
    limit: float = 0.0
    rows: int = 1

    def judge(self) -> Callable[[int, bytes], bool]:
        """Whether the answer to the message of a number, as it came, is right; all are where nothing is expected.

        It is called while others wait, so an answer that was right before is not computed with again.
        """
        if not self.expected:
            return lambda number, answer: True
        known: list[set[bytes]] = [set() for _ in self.messages]

        def is_right(number: int, answer: bytes) -> bool:
            seen = known[number]
            if answer in seen:
                return True
            right = self._is_right(number, answer)
            if right and len(seen) < VARIANTS:
                seen.add(answer)
            return right

        return is_right

    def _is_right(self, number: int, answer: bytes) -> bool:
        try:
            found = arrays(response(answer))
        except EngineError:
            return False
        return all(
            name in found and self._is_close(found[name], array) for name, array in self.expected[number].items()
        )

    def _is_close(self, found: np.ndarray, expected: np.ndarray) -> bool:
        """By relative L2, in few steps: it is computed while requests are on their way. NaN is not close."""
        if found.shape != expected.shape:
            return False
        if expected.dtype.kind != "f":
            return True
        reference = expected.astype(np.float32, copy=False).ravel()
        apart = found.astype(np.float32, copy=False).ravel() - reference
        norm = max(float(reference @ reference), 1e-12 * reference.size)
        return bool(float(apart @ apart) <= self.limit**2 * norm)


def from_bundle(model: RemoteModel, bundle: Path, engine: str | None, rows: int) -> Payload:
    """Samples that a bundle has recorded, with the outputs of its reference.

    Raises:
        UsageError: no bundle, or none of this model.
        EngineError: it has no engine, or no sample of so many rows.
    """
    manifest = read_manifest(bundle)
    records = [record for record in manifest["engines"] if record["name"] == engine] or ranked(manifest)
    if not records:
        raise EngineError(f"{bundle} has no engine whose results could be expected")
    signature = Signature.from_json(manifest["signature"])
    names = {tensor.name for tensor in model.inputs}
    if names != {spec.name for spec in signature.inputs}:
        raise UsageError(
            f"the server's model {model.name!r} is not that of {bundle}",
            expected=", ".join(spec.name for spec in signature.inputs),
            found=", ".join(sorted(names)),
        )
    pieces = [piece for sample in _samples(bundle, signature) for piece in _cut(sample, model, rows)][:MESSAGES]
    if not pieces:
        raise EngineError(f"{bundle} has recorded no sample of {rows} rows", hint="give a smaller --batch")
    return Payload(
        f"recorded samples of {bundle}",
        tuple(request(model.name, inputs) for inputs, _ in pieces),
        tuple(outputs for _, outputs in pieces),
        limit_of(records[0]),
        rows,
    )


def from_file(model: RemoteModel, file: Path, rows: int) -> Payload:
    """Arrays of an .npz file by the names of inputs, cut along their first axis.

    Raises:
        DataError: they cannot be read, or do not fit the model.
    """
    try:
        with np.load(file, allow_pickle=False) as stored:
            found = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, AttributeError) as error:
        raise DataError(f"{file} cannot be read", expected="an .npz file of arrays", found=error) from error
    wanted = {tensor.name: found[tensor.name] for tensor in model.inputs if tensor.name in found}
    sizes = {len(array) for array in wanted.values() if array.ndim} or {0}
    if len(sizes) > 1:
        raise DataError(f"the arrays of {file} have different numbers of rows", found=", ".join(map(str, sizes)))
    count = min(sizes)
    cuts = [{name: array[i : i + rows] for name, array in wanted.items()} for i in range(0, count - rows + 1, rows)]
    if not cuts:
        raise DataError(f"{file} has too few rows", expected=f"{rows} or more", found=count)
    for inputs in cuts[:1]:
        model.check(inputs)
    return Payload(f"rows of {file}", tuple(request(model.name, cut) for cut in cuts[:MESSAGES]), rows=rows)


def made_up(model: RemoteModel, shapes: Mapping[str, tuple[int, ...]], rows: int, seed: int) -> Payload:
    """Random numbers: normal ones for floats, 0 and 1 for integers.

    Args:
        shapes: of inputs that have axes of any size beside that of rows.

    Raises:
        UsageError: such an input has no shape, or a shape does not fit.
    """
    if unknown := [name for name in shapes if name not in {tensor.name for tensor in model.inputs}]:
        raise UsageError(f"the model has no input {unknown[0]!r}", expected=", ".join(map(str, model.inputs)))
    generator = np.random.default_rng(seed)
    found: dict[str, tuple[int, ...]] = {}
    for tensor in model.inputs:
        shape = shapes.get(tensor.name) or tuple(
            rows if axis == 0 and size < 0 else size for axis, size in enumerate(tensor.shape)
        )
        if any(size < 0 for size in shape):
            raise UsageError(
                f"input {tensor.name!r} has axes of any size",
                expected=f"--shape {tensor.name}:{'x'.join('N' if size < 0 else str(size) for size in tensor.shape)}",
                found=str(tensor),
            )
        found[tensor.name] = shape

    def values() -> dict[str, np.ndarray]:
        return {tensor.name: _random(generator, tensor.dtype, found[tensor.name]) for tensor in model.inputs}

    first = values()
    model.check(first)
    made = [first, *(values() for _ in range(MESSAGES // 4 - 1))]
    return Payload("random numbers", tuple(request(model.name, inputs) for inputs in made), rows=rows)


def _random(generator: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    if np.dtype(dtype).kind == "f":
        return generator.standard_normal(shape).astype(dtype)
    return generator.integers(0, 2, shape).astype(dtype)


def _samples(bundle: Path, signature: Signature) -> Iterator[Recorded]:
    try:
        yield from ReferenceOutputs(bundle / "reference", signature)
    except (DataError, ValueError, OSError) as error:
        raise EngineError(f"{bundle} has no recorded samples", hint="compile it again") from error


def _cut(sample: Recorded, model: RemoteModel, rows: int) -> Iterator[tuple[Arrays, Arrays]]:
    """Pieces of so many rows; the sample as it is where the server takes one size only."""
    merged = all(tensor.shape and tensor.shape[0] < 0 for tensor in (*model.inputs, *model.outputs))
    if not merged:
        if not sample.probe:
            yield sample.inputs, sample.outputs
        return
    count = len(next(iter(sample.inputs.values())))
    for start in range(0, count - rows + 1, rows):
        part = slice(start, start + rows)
        yield ({name: array[part] for name, array in sample.inputs.items()},
               {name: array[part] for name, array in sample.outputs.items()})  # fmt: skip
