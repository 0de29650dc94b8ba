"""What the reference makes of the samples: computed once, kept on disk, read back as a stream by NumPy alone.

Every engine of a compile is judged against the same record, and so is every engine of a bundle on a machine without
the model. It is two archives that `numpy.load` reads:

    inputs.npz     0/image 0/label 1/image ... max/image     (arrays that are no inputs of the model are labels)
    outputs.npz    0/logits        1/logits    max/logits

Beside the samples the record holds the first sample cut or repeated to the smallest and largest size of all dynamic
axes ("min", "max"): rows of a batch, and likewise tokens or pixels, stay values that the model knows. Of a decoder of
several rows it holds one token more of each ("rows"), in rows that differ: engines compute such calls in their own way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...errors import DataError
from ..data import resized
from ..signature import Signature
from ..states import IDS, next_tokens
from ..storage.files import storage_errors

if TYPE_CHECKING:
    from ..sources import Model

Arrays = Mapping[str, np.ndarray]
INPUTS, OUTPUTS = "inputs.npz", "outputs.npz"
POINTS, ROWS = ("min", "max"), "rows"
PROBES = (*POINTS, ROWS)
MAX_PROBE_ELEMENTS = 1 << 24
"""A probe at the largest sizes takes fewer rows than the maximum where its inputs would have more elements."""


@dataclasses.dataclass(frozen=True)
class Recorded:
    """One sample and what the reference made of it. `key` is its number, or one of `PROBES`."""

    key: str
    inputs: Arrays
    labels: Arrays
    outputs: Arrays

    @property
    def probe(self) -> bool:
        """Whether it was made up to reach other sizes of the dynamic axes."""
        return self.key in PROBES

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for part in (self.inputs, self.labels, self.outputs) for array in part.values())


class ReferenceOutputs:
    """The record in a folder; iterating reads one sample at a time, `max_samples` of them, and the probes.

    Raises:
        DataError: the folder holds no record.
    """

    def __init__(self, directory: Path, signature: Signature, *, max_samples: int | None = None) -> None:
        self.directory = directory
        self._max_samples = max_samples
        self.signature = signature
        self._names = {spec.name for spec in signature.inputs}
        for file in (INPUTS, OUTPUTS):
            if not zipfile.is_zipfile(directory / file):
                raise DataError(
                    f"{str(directory / file)!r} is no record of the reference", hint="compile the model again"
                )

    @classmethod
    def record(
        cls, model: Model, samples: Iterable[Arrays], directory: Path, *, max_samples: int | None = None
    ) -> ReferenceOutputs:
        """Runs the reference over the samples, from its first state each time, and over the probes.

        Raises:
            DataError: there is no sample.
        """
        with storage_errors(directory), _Recorder(model, directory) as writer:
            for index, sample in enumerate(itertools.islice(samples, max_samples)):
                writer.add(str(index), sample)
            if writer.first is None:
                raise DataError("there are no samples to judge engines on", expected="at least one", found="none")
            for point in POINTS:
                sizes = bounded(model.signature, model.signature.sizes(point))
                if sizes not in writer.sizes:
                    writer.add(point, resized(model.signature, writer.first, sizes))
            if (rows := _rows(model.signature)) is not None:
                writer.add(ROWS, next_tokens(model.signature, writer.first, writer.first_outputs, rows))
        return cls(directory, model.signature)

    def __iter__(self) -> Iterator[Recorded]:
        with np.load(self.directory / INPUTS) as inputs, np.load(self.directory / OUTPUTS) as outputs:
            for key in self._chosen(outputs.files):
                taken = {name: inputs[f"{key}/{name}"] for name in _members(inputs.files, key)}
                yield Recorded(
                    key,
                    inputs={name: array for name, array in taken.items() if name in self._names},
                    labels={name: array for name, array in taken.items() if name not in self._names},
                    outputs={name: outputs[f"{key}/{name}"] for name in _members(outputs.files, key)},
                )

    def __len__(self) -> int:
        """Number of samples, probes not counted."""
        return sum(key not in PROBES for key in self._all_keys())

    @property
    def description(self) -> str:
        """What the record holds, for people."""
        keys = self._all_keys()
        points = [key for key in keys if key in POINTS]
        suffix = f", and the {' and '.join(points)} sizes of the dynamic axes" if points else ""
        rows = ", and one token more of several rows" if ROWS in keys else ""
        return f"{len(self)} sample{'' if len(self) == 1 else 's'}{suffix}{rows}"

    def save(self, directory: Path, *, max_bytes: int = 16 << 20) -> ReferenceOutputs:
        """Copies the first sample, and of the others those that fit into `max_bytes`, to another folder."""
        with (
            storage_errors(directory),
            _Archive(directory / INPUTS) as inputs,
            _Archive(directory / OUTPUTS) as outputs,
        ):
            total = 0
            for sample in self:
                if total and total + sample.nbytes > max_bytes:
                    continue
                total += sample.nbytes
                inputs.add(sample.key, {**sample.inputs, **sample.labels})
                outputs.add(sample.key, sample.outputs)
        return ReferenceOutputs(directory, self.signature)

    def _all_keys(self) -> list[str]:
        with np.load(self.directory / OUTPUTS) as outputs:
            return self._chosen(outputs.files)

    def _chosen(self, files: Iterable[str]) -> list[str]:
        keys = _keys(files)
        samples = [key for key in keys if key not in PROBES]
        return samples[: self._max_samples] + [key for key in keys if key in PROBES]


class _Archive:
    """An .npz archive written array by array, the same bytes for the same arrays."""

    def __init__(self, path: Path) -> None:
        self._file = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED)

    def __enter__(self) -> _Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, key: str, arrays: Arrays) -> None:
        for name, array in arrays.items():
            with self._file.open(zipfile.ZipInfo(f"{key}/{name}.npy"), "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, np.asarray(array), allow_pickle=False)


class _Recorder:
    """Runs the reference and writes both archives."""

    def __init__(self, model: Model, directory: Path) -> None:
        from .polygraphy_io import ReferenceRunner  # a machine that only reads records may lack it

        self._signature = model.signature
        self._runner = ReferenceRunner(model.reference, model.signature)
        self._names = [spec.name for spec in model.signature.inputs]
        self._inputs, self._outputs = _Archive(directory / INPUTS), _Archive(directory / OUTPUTS)
        self.first: Arrays | None = None
        self.first_outputs: Arrays = {}
        self.sizes: list[dict[str, int]] = []

    def __enter__(self) -> _Recorder:
        self._runner.activate()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.ExitStack() as stack:  # a full disk may stop any of them, and must not keep the rest open
            stack.push(self._inputs.__exit__)
            stack.push(self._outputs.__exit__)
            self._runner.deactivate()

    def add(self, key: str, sample: Arrays) -> None:
        inputs = {name: sample[name] for name in self._names}
        outputs = self._runner.infer(inputs, check_inputs=False)
        self._inputs.add(key, sample)
        self._outputs.add(key, outputs)
        if self.first is None:
            self.first, self.first_outputs = inputs, outputs
        if (sizes := self._signature.check(inputs)) not in self.sizes:
            self.sizes.append(sizes)


def bounded(signature: Signature, sizes: dict[str, int]) -> dict[str, int]:
    """These sizes of dynamic axes, with fewer rows where the inputs would have more than `MAX_PROBE_ELEMENTS`.

    Two stay where the axis has room for them, for one row alone cannot be mixed up with others.
    """
    batch = signature.batch_axis
    elements = _elements(signature, sizes)
    if batch is None or elements <= MAX_PROBE_ELEMENTS:
        return sizes
    rows = max(MAX_PROBE_ELEMENTS * sizes[batch] // elements, signature.axes[batch].min, 2)
    return {**sizes, batch: min(rows, sizes[batch])}


def _rows(signature: Signature) -> int | None:
    """How many rows of a decoder get one token more: three, two of large caches; None where it takes no such call."""
    if not signature.states:
        return None
    rows, time = signature.input(IDS).shape
    if not isinstance(rows, str) or signature.axes[rows].max == 1:
        return None
    if (signature.axes[time].min if isinstance(time, str) else time) > 1:
        return None
    axis = signature.axes[rows]
    return bounded(signature, {rows: max(axis.min, min(axis.max, 3))})[rows]


def _elements(signature: Signature, sizes: Mapping[str, int]) -> int:
    return sum(math.prod(shape) for shape in signature.shapes(sizes).values())


def _keys(files: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(file.partition("/")[0] for file in files))


def _members(files: Iterable[str], key: str) -> list[str]:
    return [file.partition("/")[2] for file in files if file.partition("/")[0] == key]
