"""What the tensors of a graph held on the data: the result of one pass, kept in one file."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...errors import DataError
from ..storage.files import storage_errors
from .findings import Finding, findings
from .histogram import Histogram

Detail = Literal["range", "full"]
_VERSION = 2


@dataclasses.dataclass(frozen=True)
class TensorStatistics:
    """One tensor. Values are those of all samples; finite ones alone, but for `masked`.

    Attributes:
        count: how many elements were seen.
        masked: how many of them were NaN, infinite or beyond 1e30, as in the masks of attention. These are in no
            other number here, but that finite ones count in `low` and `high`.
        low, high: exact; `low` of an image that no operator lets be negative is 0.
        average_low, average_high: moving average of the extremes of batches.

    With detail "full", each from a part of the elements, chosen at random, seeded, where a tensor is large; of images
    from the first 64 samples and every 16th batch that follows:
        histogram: counts by value.
        exponents: (256,) counts by the exponent field of float32: ``e`` counts ``2**(e-127) <= |x| < 2**(e-126)``,
            0 what is smaller, zero too.
        zeros: how many elements are zero.
        smallest: smallest magnitude that is not zero; infinite where there is none.
        rms: root of the mean square.

    With detail "full"; None where the number of channels varies or a channel has masked values:
        channel_axis: the axis; counted from the end where negative.
        channel_low, channel_high: (channels,), exact.
        channel_mean: (channels,), over all elements, of images those in the batches that histograms are from.
    """

    count: int
    masked: int
    low: float
    high: float
    average_low: float
    average_high: float
    histogram: Histogram | None = None
    exponents: np.ndarray | None = None
    zeros: float = 0.0
    smallest: float = np.inf
    rms: float = 0.0
    channel_axis: int | None = None
    channel_low: np.ndarray | None = None
    channel_high: np.ndarray | None = None
    channel_mean: np.ndarray | None = None

    @property
    def peak(self) -> float:
        """The largest magnitude."""
        return max(abs(self.low), abs(self.high))

    def clipped(self, low: float, high: float) -> float:
        """The share of elements beyond these limits."""
        if self.histogram is None:
            raise ValueError("statistics of ranges alone do not tell how much lies beyond a limit")
        outside = (self.histogram.edges[1:] <= low) | (self.histogram.edges[:-1] >= high)
        total = self.histogram.counts.sum()
        return float(self.histogram.counts[outside].sum() / total) if total else 0.0


_SCALARS = tuple(
    field.name
    for field in dataclasses.fields(TensorStatistics)
    if not field.name.startswith("channel") and field.name not in ("histogram", "exponents")
)
_ARRAYS = ("exponents", "channel_low", "channel_high", "channel_mean")


@dataclasses.dataclass(frozen=True)
class Statistics(Mapping[str, TensorStatistics]):
    """Statistics by tensor name.

    Attributes:
        tensors: tensors whose values are all finite and below 1e30.
        left_out: the others: masks, and what leads to NaN that later nodes replace. They take no part in quantization.
        empty: tensors without a finite value.
        inputs: smallest and largest value, largest number of elements in a batch, and whether it is a float, of each
            input of the graph.
        samples: how many samples were run.
        distinct: how many of them differ.
        data_digest: SHA-256 of the samples.
        random: whether the samples were made up.
        detail: what was collected.
    """

    tensors: Mapping[str, TensorStatistics]
    left_out: Mapping[str, TensorStatistics]
    empty: frozenset[str]
    inputs: Mapping[str, tuple[float, float, int, bool]]
    samples: int
    distinct: int
    data_digest: str
    random: bool
    detail: Detail

    def __getitem__(self, name: str) -> TensorStatistics:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def everything(self) -> dict[str, TensorStatistics]:
        """The tensors that were left out too."""
        return {**self.tensors, **self.left_out}

    def only(self, names: Collection[str]) -> Statistics:
        """The statistics of these tensors."""
        return dataclasses.replace(
            self,
            tensors={name: self.tensors[name] for name in names if name in self.tensors},
            left_out={name: self.left_out[name] for name in names if name in self.left_out},
            empty=self.empty.intersection(names),
        )

    def joined(self, other: Statistics) -> Statistics:
        """These with those of other tensors on the same data."""
        return dataclasses.replace(
            self,
            tensors={**self.tensors, **other.tensors},
            left_out={**self.left_out, **other.left_out},
            empty=self.empty | other.empty,
        )

    def findings(self, limits: Mapping[str, tuple[float, float]] | None = None) -> list[Finding]:
        """What a user should know; saturation too where `limits` tell the chosen range of tensors."""
        return list(findings(self, limits))

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of all of it, for the manifest."""
        result = hashlib.sha256()
        for name, array in sorted(self._arrays().items()):
            result.update(f"{name} {array.dtype.str} {array.shape}".encode())
            result.update(np.ascontiguousarray(array).tobytes())
        return result.hexdigest()

    def save(self, path: Path) -> None:
        """Writes an .npz file that NumPy reads without pickle; whole, or not at all.

        Raises:
            OutputError, StorageError: it cannot be written.
        """
        path = Path(path)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with storage_errors(path):
                with partial.open("wb") as stream:
                    np.savez_compressed(stream, allow_pickle=False, **self._arrays())
                partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Reads what `save` wrote.

        Raises:
            DataError: the file is damaged, or is something else.
        """
        path = Path(path)
        try:
            with np.load(path, allow_pickle=False) as archive:
                head = json.loads(archive["head"].tobytes())
                if head["version"] != _VERSION:
                    raise DataError(f"{path.name} is of another version", expected=_VERSION, found=head["version"])
                tensors = _unpack(head["tensors"], {name: archive[name] for name in archive.files})
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise DataError(f"{path.name} holds no statistics of tensors", found=error) from error
        left_out = frozenset(head["left_out"])
        return cls(
            tensors={name: tensor for name, tensor in tensors.items() if name not in left_out},
            left_out={name: tensor for name, tensor in tensors.items() if name in left_out},
            empty=frozenset(head["empty"]),
            inputs={name: tuple(entry) for name, entry in head["inputs"].items()},
            samples=head["samples"],
            distinct=head["distinct"],
            data_digest=head["data_digest"],
            random=head["random"],
            detail=head["detail"],
        )

    def _arrays(self) -> dict[str, np.ndarray]:
        tensors = self.everything()
        head = {
            "version": _VERSION,
            "left_out": sorted(self.left_out),
            "empty": sorted(self.empty),
            "inputs": dict(self.inputs),
            "samples": self.samples,
            "distinct": self.distinct,
            "data_digest": self.data_digest,
            "random": self.random,
            "detail": self.detail,
            "tensors": [
                {
                    "name": name,
                    "channel_axis": tensor.channel_axis,
                    "lengths": [-1 if array is None else len(array) for array in _arrays_of(tensor)],
                    "first": tensor.histogram.first if tensor.histogram else 0,
                    "width": tensor.histogram.width if tensor.histogram else 0.0,
                }
                for name, tensor in tensors.items()
            ],
        }
        columns = zip(*map(_arrays_of, tensors.values()), strict=True) if tensors else ()
        arrays = {
            name: np.concatenate([*(array for array in column if array is not None), np.zeros(0)])
            for name, column in zip(("counts", *_ARRAYS), columns, strict=False)
        }
        scalars = np.array([[getattr(tensor, name) for name in _SCALARS] for tensor in tensors.values()], np.float64)
        text = json.dumps(head, sort_keys=True).encode()
        return {"head": np.frombuffer(text, np.uint8), "scalars": scalars, **arrays}


def _arrays_of(tensor: TensorStatistics) -> tuple[np.ndarray | None, ...]:
    counts = tensor.histogram.counts if tensor.histogram else None
    return counts, *(getattr(tensor, name) for name in _ARRAYS)


def _unpack(heads: list[dict[str, Any]], arrays: Mapping[str, np.ndarray]) -> dict[str, TensorStatistics]:
    used = dict.fromkeys(("counts", *_ARRAYS), 0)
    tensors = {}
    for head, row in zip(heads, arrays["scalars"], strict=True):
        own: dict[str, Any] = dict(zip(_SCALARS, row.tolist(), strict=True))
        for name, length in zip(used, head["lengths"], strict=True):
            own[name] = None if length < 0 else arrays[name][used[name] : used[name] + length]
            used[name] += max(length, 0)
        counts = own.pop("counts")
        own["histogram"] = None if counts is None else Histogram(counts, head["first"], head["width"])
        own["count"], own["masked"] = int(own["count"]), int(own["masked"])
        tensors[head["name"]] = TensorStatistics(**own, channel_axis=head["channel_axis"])
    return tensors
