"""Samples for calibration, validation and benchmarks: read as a stream, checked against the signature.

A source is an .npz file keyed by input name, an .npy file for a model of one input, a folder of .npz files (one batch
each), a Polygraphy input file (.json), or ``file.py:function``, whose function yields dicts of arrays. Where the
leading axis of a file is longer than a batch, it is cut into batches of the optimum size. Arrays that are not inputs of
the model (labels, for a metric) travel along.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from ..errors import DataError
from .signature import Signature
from .states import completed, made_up
from .storage.files import sha256

Batch = dict[str, np.ndarray]
RANDOM_BATCHES = 8
RANDOM_CALLS = 2
"""Of a decoder, whose caches are large."""


class Samples(Protocol):
    """Inputs that can be iterated any number of times, one batch in memory at a time.

    Attributes:
        description: where they come from, for people.
        random: whether they were made up because the user gave none.
    """

    description: str
    random: bool

    def __iter__(self) -> Iterator[Batch]:
        """Yields inputs by name."""


class Data:
    """`Samples` over a source of batches, every one checked before it is handed on.

    Attributes:
        digest: SHA-256 of what the batches are made from.
    """

    def __init__(
        self, read: Callable[[], Iterator[Batch]], signature: Signature, *, description: str, digest: str, random: bool
    ) -> None:
        self._read = read
        self._signature = signature
        self._names = frozenset(spec.name for spec in signature.inputs)
        self.description = description
        self.digest = digest
        self.random = random

    def __iter__(self) -> Iterator[Batch]:
        """Yields the model's inputs, without labels."""
        for batch in self.labelled():
            yield {name: batch[name] for name in batch if name in self._names}

    def labelled(self) -> Iterator[Batch]:
        """Yields inputs together with the arrays that are not inputs of the model.

        Raises:
            DataError: a batch that does not fit the signature or holds NaN or Inf; no batch at all.
        """
        count = 0
        for count, given in enumerate(self._read(), start=1):
            try:
                batch = completed(self._signature, given) if self._signature.states else given
                self._check(batch)
            except DataError as error:
                error.message = f"{self.description}, batch {count}: {error.message}"
                raise
            yield batch
        if not count:
            raise DataError(f"{self.description} holds no samples", expected="at least one", found="none")

    def unchecked(self) -> Iterator[Batch]:
        """Yields what the source gives, at the pace at which it does."""
        return self._read()

    def first(self) -> Batch:
        """The first batch, inputs only."""
        return next(iter(self))

    def _check(self, batch: Batch) -> None:
        # Names first, so that a misspelt input is told apart from a label.
        self._signature.check({n: a for n, a in batch.items() if n in self._names} or batch)
        for name, array in batch.items():
            if name in self._names and array.dtype.kind == "f" and not np.isfinite(array).all():
                raise DataError(f"input {name!r} holds NaN or Inf", expected="finite numbers")


def open_data(source: str | None, signature: Signature, *, seed: int = 0) -> Data:
    """Opens a source of data, or makes up random inputs where `source` is None, and checks the first batch.

    Random floats are standard normal; random integers are 0 or 1, so that they index any table.

    Raises:
        DataError: the source does not exist, cannot be read, or does not fit the signature.
    """
    if source is None:
        data = Data(
            lambda: _random(signature, seed),
            signature,
            description=f"random inputs (seed {seed})",
            digest=f"random-{seed}",
            random=True,
        )
    else:
        path = Path(source)
        read = _reader(source, signature)
        data = Data(read, signature, description=path.name, digest=digest(source), random=False)
    data.first()
    return data


def digest(source: str) -> str:
    """SHA-256 of a file, of the files in a folder, or of the code that yields data."""
    path = Path(source)
    if not path.exists() and ".py:" in source:
        path = Path(source.rpartition(":")[0])
    result = hashlib.sha256(source.rpartition(":")[2].encode() if path.suffix == ".py" else b"")
    for file in sorted(path.glob("*.npz")) if path.is_dir() else [path]:
        result.update(sha256(file).encode())
    return result.hexdigest()


def _reader(source: str, signature: Signature) -> Callable[[], Iterator[Batch]]:
    path = Path(source)
    if ".py:" in source and not path.exists():
        return _function_reader(source)
    if not path.exists():
        raise DataError(
            f"data {source!r} does not exist", hint="give an .npz, .npy, folder of .npz or file.py:function"
        )
    if path.is_dir():
        files = sorted(path.glob("*.npz"))
        if not files:
            raise DataError(f"folder {source!r} holds no samples", expected=".npz files", found="none")
        return lambda: (batch for file in files for batch in _read_npz(file, signature))
    if path.suffix == ".npz":
        return lambda: _read_npz(path, signature)
    if path.suffix == ".npy":
        return lambda: _read_npy(path, signature)
    if path.suffix == ".json":
        return lambda: _read_polygraphy(path)
    raise DataError(
        f"data {source!r} is of an unknown kind",
        expected=".npz, .npy, .json (Polygraphy), a folder of .npz, or file.py:function",
        found=path.suffix or "no suffix",
    )


def _function_reader(source: str) -> Callable[[], Iterator[Batch]]:
    from .sources.user_code import check_call, load_symbol, running

    function = load_symbol(source, kind="data function", error=DataError)
    check_call(function, source, kind="data function", error=DataError)
    file = Path(source.rpartition(":")[0]).absolute()

    def read() -> Iterator[Batch]:
        with running(file, error=DataError):
            made = function()
        if not isinstance(made, Iterable):
            raise DataError(
                f"data function {source!r} gives nothing that can be iterated",
                expected="dicts of arrays by input name",
                found=type(made).__name__,
            )
        items = iter(made)
        while True:
            with running(file, error=DataError):
                item = next(items, None)
            if item is None:
                return
            if not isinstance(item, Mapping):
                raise DataError(
                    f"{source} yields something else than inputs",
                    expected="dicts of arrays by input name",
                    found=type(item).__name__,
                )
            yield {str(name): _array(value, f"{source}, {name!r}") for name, value in item.items()}

    return read


def _array(value: Any, what: str) -> np.ndarray:
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists; tensors that NumPy cannot take
        raise DataError(f"{what} is no array", expected="an array of numbers", found=error) from error
    if array.dtype.hasobject:
        raise DataError(f"{what} holds Python objects", expected="an array of numbers", found=type(value).__name__)
    return array


def _random(signature: Signature, seed: int) -> Iterator[Batch]:
    generator = np.random.default_rng(seed)
    for _ in range(RANDOM_CALLS if signature.states else RANDOM_BATCHES):
        yield random_batch(signature, generator)


def random_batch(signature: Signature, generator: np.random.Generator, sizes: Mapping[str, int] | None = None) -> Batch:
    """One batch of made-up inputs at `sizes` of the dynamic axes (the optimum where not given)."""
    batch: Batch = {}
    for name, shape in signature.shapes(sizes).items():
        dtype = np.dtype(signature.input(name).dtype)
        values = generator.standard_normal(shape) if dtype.kind == "f" else generator.integers(0, 2, shape)
        batch[name] = np.asarray(values, dtype=dtype)
    return made_up(signature, batch, generator) if signature.states else batch


def resized(signature: Signature, sample: Mapping[str, np.ndarray], sizes: Mapping[str, int]) -> Batch:
    """A sample with its dynamic axes repeated or cut to these sizes: values that the model knows, at another size."""
    arrays: Batch = {}
    for name, shape in signature.shapes(sizes).items():
        array = np.asarray(sample[name])
        for axis, size in enumerate(shape):
            if array.shape[axis] != size:
                array = np.take(array, np.arange(size) % array.shape[axis], axis=axis)
        arrays[name] = np.asarray(array, order="C")
    return arrays


def as_declared(inputs: Mapping[str, Any], signature: Signature) -> dict[str, Any]:
    """The inputs with floating-point arrays in the width that the signature declares; everything else as it is."""
    declared = {spec.name: spec.dtype for spec in signature.inputs}
    return {name: _of_width(array, declared.get(name, "")) for name, array in inputs.items()}


def _of_width(array: Any, dtype: str) -> Any:
    floats = ("float16", "float32", "float64")
    return array.astype(dtype) if dtype in floats and str(array.dtype) in floats and array.dtype != dtype else array


def other_sizes(signature: Signature) -> list[dict[str, int]]:
    """For each dynamic axis of more than one size, sizes that differ from the optimum in that axis alone."""
    found = []
    for name, axis in signature.axes.items():
        other = axis.min if axis.min < axis.opt else axis.opt + 1
        if other in axis:
            found.append({**signature.sizes(), name: other})
    return found


def _read_polygraphy(path: Path) -> Iterator[Batch]:
    from polygraphy.exception import PolygraphyException
    from polygraphy.json import load_json

    try:
        feeds = load_json(str(path))
        batches = [{name: np.asarray(array) for name, array in feed.items()} for feed in feeds]
    except (PolygraphyException, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path.name} is not a Polygraphy input file", found=error) from error
    yield from batches


def _read_npy(path: Path, signature: Signature) -> Iterator[Batch]:
    if len(signature.inputs) != 1:
        names = ", ".join(spec.name for spec in signature.inputs)
        raise DataError(f"{path.name} holds one array, the model has several inputs", expected=f".npz with {names}")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path.name} is not a readable .npy file", found=error) from error
    name = signature.inputs[0].name
    for start, stop in _cuts({name: array.shape}, signature, path.name):
        yield {name: np.array(array[start:stop]) if stop else np.array(array)}


def _read_npz(path: Path, signature: Signature) -> Iterator[Batch]:
    """Streams rows out of the archive: np.load would unpack every array whole."""
    try:
        with zipfile.ZipFile(path) as archive, ExitStack() as stack:
            entries = {
                name.removesuffix(".npy"): _Entry(stack.enter_context(archive.open(name)), path.name)
                for name in archive.namelist()
            }
            shapes = {name: entry.shape for name, entry in entries.items()}
            rows = _rows(shapes, signature)
            for start, stop in _cuts(shapes, signature, path.name):
                yield {
                    name: entry.rows(stop - start) if stop and entry.shape[:1] == (rows,) else entry.whole()
                    for name, entry in entries.items()
                }
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise DataError(f"{path.name} is not a readable .npz file", found=error) from error


class _Entry:
    """One array of an .npz archive, read front to back."""

    def __init__(self, stream: IO[bytes], where: str) -> None:
        try:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            self.shape, self._fortran, self._dtype = read(stream)
        except ValueError as error:
            raise DataError(f"{where} holds something else than arrays", found=error) from error
        if self._dtype.hasobject:
            raise DataError(f"{where} holds Python objects", expected="arrays of numbers", found=str(self._dtype))
        self._stream = stream
        self._kept: np.ndarray | None = None

    def rows(self, count: int) -> np.ndarray:
        if self._fortran:  # rows do not lie together
            array = self.whole()
            self._kept = array[count:]
            return np.ascontiguousarray(array[:count])
        return self._read((count, *self.shape[1:]))

    def whole(self) -> np.ndarray:
        if self._kept is None:
            array = self._read(self.shape[::-1] if self._fortran else self.shape)
            self._kept = array.T if self._fortran else array
        return self._kept

    def _read(self, shape: tuple[int, ...]) -> np.ndarray:
        size = int(np.prod(shape)) * self._dtype.itemsize
        buffer = self._stream.read(size)
        if len(buffer) != size:
            raise EOFError(f"array of shape {self.shape} ends early")
        return np.frombuffer(buffer, dtype=self._dtype).reshape(shape).copy()


def _rows(shapes: Mapping[str, tuple[int, ...]], signature: Signature) -> int | None:
    """Length of the leading axis along which a file is cut; None where it holds one batch as it is."""
    specs = [spec for spec in signature.inputs if shapes.get(spec.name) and spec.shape]
    batched = [
        s
        for s in specs
        if (shapes[s.name][0] != s.shape[0] if isinstance(s.shape[0], int) else s.shape[0] == signature.batch_axis)
    ]
    return shapes[batched[0].name][0] if batched else None


def _cuts(shapes: Mapping[str, tuple[int, ...]], signature: Signature, where: str) -> list[tuple[int, int]]:
    """Ranges of rows, one a batch; ``(0, 0)`` stands for the whole file."""
    rows = _rows(shapes, signature)
    if rows is None:
        return [(0, 0)]
    if signature.batch_axis:
        smallest, size = signature.axes[signature.batch_axis].min, signature.axes[signature.batch_axis].opt
    else:
        spec = next(s for s in signature.inputs if s.shape and shapes.get(s.name, ())[:1] == (rows,))
        smallest = size = int(spec.shape[0])
    cuts = [(start, min(start + size, rows)) for start in range(0, rows, size)]
    if cuts and cuts[-1][1] - cuts[-1][0] < smallest:
        cuts.pop()
    if not cuts:
        raise DataError(f"{where} holds fewer rows than one batch", expected=smallest, found=rows)
    return cuts


def describe(data: Data) -> dict[str, Any]:
    """The manifest's record of the data."""
    return {"description": data.description, "random": data.random, "digest": data.digest}
