"""How far an engine's outputs are from the reference's, sample by sample, and whether that is within tolerance.

For a reference r and an output y of one sample, in float64:

    relative_l2 = ||y - r|| / ||r||        max_abs = max|y - r| / max|r|        cosine = <y, r> / (||y|| ||r||)

The worst sample decides each of them. Where r is all zero the first two are absolute and the cosine does not exist.
Integers and booleans must be equal. No bound holds for a NaN, and no sample is kept in memory.

Values that a mask pushes far out (-1e9, the lowest float) would drown every error in the rest, so where the largest
magnitude is at least MASK_MAGNITUDE and MASK_RATIO times all others, the two groups are measured apart and the worse
one counts.

An output is taken for class scores, and its best classes are compared, where it is a float array (rows, classes >= 2)
whose rows are not unit vectors with negative values (those are embeddings); with more axes, where it is known to be
one. A class that the reference scores equal to its best, within float32 rounding, is as good as the best, and one
row may always differ unless all must agree.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import cast

import numpy as np

from ...errors import RecipeError, UnknownNameError
from ..manifest import OutputMetrics, Tolerance

_INT8 = Tolerance(relative_l2=0.15, max_abs=0.25, cosine=0.985, top1=0.97)

TOLERANCES: dict[str, Tolerance] = {
    # Another order of summation costs 1e-6 to 1e-5 in deep networks. TF32, with 11 bits, fails this, as it should.
    "fp32": Tolerance(relative_l2=1e-4, max_abs=1e-3, cosine=0.999999, top1=0.999),
    # 11 bits: a rounding is off by 2^-11 = 5e-4 at most. A sentence encoder in half precision was measured at 2e-3.
    "fp16": Tolerance(relative_l2=5e-3, max_abs=1e-2, cosine=0.9999, top1=0.99),
    # 8 bits: eight times the step of fp16. A sentence encoder was measured at 5e-3 and an LSTM at 3e-2.
    "bf16": Tolerance(relative_l2=4e-2, max_abs=8e-2, cosine=0.999, top1=0.98),
    # A sentence encoder was measured at 0.04 on sentences and at 0.07 on random words.
    "int8-weights": Tolerance(relative_l2=0.1, max_abs=0.15, cosine=0.995, top1=0.98),
    # A good quantization of a sentence encoder was measured at 0.1, a poor one (cosine 0.95) at 0.3.
    "int8": _INT8,
    "int8-dynamic": _INT8,
    "fp8": _INT8,
    "int4-weights": _INT8,
    "mixed": _INT8,
}
TOLERANCES.update({f"mixed-{precision}": TOLERANCES[precision] for precision in ("fp16", "bf16")})
"""What each precision may differ by. Weights scaled by 1.2 (relative_l2 0.2 in one layer) are outside all of them."""

PRECISION_OF = {"float16": "fp16", "bfloat16": "bf16"}
"""The precision in which a model computes whose outputs are of that dtype; fp32 for all others."""

MASK_MAGNITUDE, MASK_RATIO = 1e4, 1e3


def resolve_tolerance(precision: str, override: Mapping[str, float] | None = None) -> Tolerance:
    """The tolerance of `precision` with the user's bounds in place of some of its own.

    Raises:
        UnknownNameError: no precision or no bound of that name.
        RecipeError: a bound that nothing or everything would meet.
    """
    if precision not in TOLERANCES:
        raise UnknownNameError("precision", precision, TOLERANCES)
    bounds = cast(dict[str, float], dict(TOLERANCES[precision]))
    for key, value in (override or {}).items():
        if key not in bounds:
            raise UnknownNameError("tolerance", key, bounds)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise RecipeError(f"tolerance {key!r} is not a bound", expected="a number of at least 0", found=value)
        bounds[key] = float(value)
    return cast(Tolerance, bounds)


def coarser(precision: str, dtypes: Iterable[str]) -> str:
    """The coarsest of the engine's precision and those of the reference's outputs: what is right cannot be finer.

    Raises:
        UnknownNameError: no precision of that name.
    """
    if precision not in TOLERANCES:
        raise UnknownNameError("precision", precision, TOLERANCES)
    return max((precision, *(PRECISION_OF.get(dtype, "fp32") for dtype in dtypes)), key=list(TOLERANCES).index)


@dataclasses.dataclass(frozen=True)
class Difference:
    """One output of one sample against the reference. A number that does not exist is None.

    Attributes:
        nan: places where the output has NaN and the reference has not; `inf` likewise.
        rows: rows of class scores, of which `top1` and `top5` agree; 0 where the output is not class scores, and
            `top5` is None where there are no more than five classes.
        problem: what else is wrong, in a sentence; empty where nothing is.
    """

    relative_l2: float | None = None
    max_abs: float | None = None
    cosine: float | None = None
    snr_db: float | None = None
    nan: int = 0
    inf: int = 0
    rows: int = 0
    top1: int = 0
    top5: int | None = None
    problem: str = ""


def compare(reference: np.ndarray, output: np.ndarray, dtype: str | None = None, *, scores: bool = False) -> Difference:
    """Compares one output of one sample.

    Args:
        dtype: what the output should have where it is not the reference's.
        scores: it is class scores (..., classes), whatever its rank.
    """
    if (found := str(output.dtype)) != (expected := dtype or str(reference.dtype)):
        return Difference(problem=f"dtype is {found}, expected {expected}")
    if output.shape != reference.shape:
        return Difference(problem=f"shape is {output.shape}, expected {reference.shape}")
    if not reference.size:
        return Difference(problem=f"the reference is empty, of shape {reference.shape}, so nothing can be judged")
    if not _is_float(reference.dtype):
        differing = int(np.count_nonzero(reference != output))
        return Difference(problem=f"{differing} of {reference.size} values differ" if differing else "")
    r, y = _float64(reference), _float64(output)
    finite = np.isfinite(r)
    if not finite.any():
        return Difference(problem="the reference holds no finite value, so nothing can be judged")
    unlike = np.count_nonzero(~finite & (r != y) & ~(np.isnan(r) & np.isnan(y)))
    with np.errstate(all="ignore"):
        parts = [_measure(r[group], y[group]) for group in _groups(r, finite)]
        if scores:
            r, y = (array.reshape(-1, array.shape[-1]) for array in (r, y))
        rows, top1, top5 = _agreement(r, y) if _is_scores(r) else (0, 0, None)
    return Difference(
        relative_l2=_worst(max, (part.relative_l2 for part in parts)),
        max_abs=_worst(max, (part.max_abs for part in parts)),
        cosine=_worst(min, (part.cosine for part in parts)),
        snr_db=_worst(min, (part.snr_db for part in parts)),
        nan=int(np.count_nonzero(np.isnan(y) & ~np.isnan(r))),
        inf=int(np.count_nonzero(np.isinf(y) & ~np.isinf(r))),
        rows=rows,
        top1=top1,
        top5=top5,
        problem=f"{unlike} values are not the NaN or Inf that the reference has there" if unlike else "",
    )


class Judge:
    """Collects the differences of one engine over samples, and gives its verdict.

    Args:
        dtypes: what an output should have where that is not the reference's dtype.
        scores: outputs that are known to be class scores, whatever their rank.
    """

    def __init__(
        self, tolerance: Tolerance, dtypes: Mapping[str, str] | None = None, scores: Collection[str] = ()
    ) -> None:
        self.tolerance = tolerance
        self._dtypes = dtypes or {}
        self._scores = scores
        self._differences: dict[str, Difference] = {}
        self._problems: dict[str, list[str]] = {}
        self._searched: set[str] = set()

    def update(self, reference: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> dict[str, Difference]:
        """Takes in one sample and returns its differences by output."""
        sample = {}
        outputs = {name: np.asarray(array) for name, array in outputs.items()}
        for name, array in reference.items():
            if name not in outputs:
                sample[name] = Difference(problem=f"is missing; the engine gives {', '.join(outputs) or 'nothing'}")
                continue
            found = compare(array, outputs[name], self._dtypes.get(name), scores=name in self._scores)
            if failures(found, self.tolerance) and (twin := self._twin(name, array, outputs)):
                found = dataclasses.replace(found, problem=f"equals the engine's output {twin!r}: outputs are swapped")
            sample[name] = found
        for name in outputs.keys() - reference.keys():
            sample[name] = Difference(problem="the reference has no such output")
        for name, found in sample.items():
            self._add(name, found)
        return sample

    def fail(self, names: Iterable[str], problem: str) -> None:
        """Fails outputs for a reason that is not in numbers."""
        for name in names:
            self._add(name, Difference(problem=problem))

    def metrics(self) -> list[OutputMetrics]:
        """The worst of every number by output, with the bounds that do not hold."""
        return [self._record(name, total) for name, total in self._differences.items()]

    def _twin(self, name: str, array: np.ndarray, outputs: Mapping[str, np.ndarray]) -> str | None:
        """The output that should have been this one, searched in the first sample that is wrong."""
        if name in self._searched:
            return None
        self._searched.add(name)
        others = (other for other in outputs if other != name and outputs[other].shape == array.shape)
        return next((o for o in others if not failures(compare(array, outputs[o]), self.tolerance)), None)

    def _add(self, name: str, found: Difference) -> None:
        problems = self._problems.setdefault(name, [])
        if found.problem and found.problem not in problems:
            problems.append(found.problem)
        total = self._differences.get(name, Difference())
        self._differences[name] = Difference(
            relative_l2=_worst(max, (total.relative_l2, found.relative_l2)),
            max_abs=_worst(max, (total.max_abs, found.max_abs)),
            cosine=_worst(min, (total.cosine, found.cosine)),
            snr_db=_worst(min, (total.snr_db, found.snr_db)),
            nan=total.nan + found.nan,
            inf=total.inf + found.inf,
            rows=total.rows + found.rows,
            top1=total.top1 + found.top1,
            top5=found.top5 if total.top5 is None else total.top5 + (found.top5 or 0),
        )

    def _record(self, name: str, total: Difference) -> OutputMetrics:
        reasons = [*self._problems[name][:5], *failures(total, self.tolerance)]
        return OutputMetrics(
            output=name,
            relative_l2=_json(total.relative_l2),
            max_abs=_json(total.max_abs),
            cosine=_json(total.cosine),
            snr_db=_json(total.snr_db),
            nan=total.nan,
            inf=total.inf,
            top1=total.top1 / total.rows if total.rows else None,
            top5=total.top5 / total.rows if total.rows and total.top5 is not None else None,
            passed=not reasons,
            failures=reasons,
        )


def failures(difference: Difference, tolerance: Tolerance) -> list[str]:
    """The bounds that do not hold, in words. Written so that a NaN holds none."""
    found = [difference.problem] if difference.problem else []
    for kind, count in (("NaN", difference.nan), ("Inf", difference.inf)):
        if count:
            found.append(f"{count} {kind} where the reference has none")
    bounds = cast(Mapping[str, float], tolerance)
    for key, value in (("relative_l2", difference.relative_l2), ("max_abs", difference.max_abs)):
        if value is not None and not value <= bounds[key]:
            found.append(f"{key} is {value:.3g}, allowed {bounds[key]:g}")
    if difference.cosine is not None and not difference.cosine >= bounds["cosine"]:
        found.append(f"cosine is {difference.cosine:.6g}, required {bounds['cosine']:g}")
    if difference.rows - difference.top1 > _allowed_flips(difference.rows, bounds["top1"]):
        found.append(f"top1 is {difference.top1 / difference.rows:.6g}, required {bounds['top1']:g}")
    return found


def _allowed_flips(rows: int, share: float) -> int:
    """Rows whose best class may differ: one at least unless all must agree, since a single near-tie proves nothing."""
    return max(int(share < 1), int((1 - share) * rows))


def _measure(r: np.ndarray, y: np.ndarray) -> Difference:
    """Numbers of a group of values, scaled by the largest so that no square overflows."""
    peak = float(np.abs(r).max())
    if peak == 0:
        return Difference(relative_l2=float(np.linalg.norm(y)), max_abs=float(np.abs(y).max()))
    r, y = r / peak, y / peak
    size, length, error = (float(np.linalg.norm(v)) for v in (r, y, y - r))
    return Difference(
        relative_l2=error / size,
        max_abs=float(np.abs(y - r).max()),
        cosine=float(np.dot(r, y)) / (size * length) if length != 0 else 0.0,
        snr_db=float(20 * np.log10(size / error)) if error != 0 else None,
    )


def _groups(r: np.ndarray, finite: np.ndarray) -> list[np.ndarray]:
    """The finite places, apart where some stand far out; see the top of this file."""
    size = np.where(finite, np.abs(r), 0)
    peak = size.max()
    ordinary = finite & (size < peak)
    rest = size[ordinary].max(initial=0)
    if peak < MASK_MAGNITUDE or rest == 0 or peak < MASK_RATIO * rest:
        return [finite]
    return [finite & ~ordinary, ordinary]


def _is_float(dtype: np.dtype) -> bool:
    return dtype.kind in "fc" or "float" in dtype.name


def _float64(array: np.ndarray) -> np.ndarray:
    """In float64; complex numbers as pairs on a last axis."""
    if array.dtype.kind == "c":
        return np.ascontiguousarray(array, np.complex128)[..., None].view(np.float64)
    return np.asarray(array, np.float64)


def _is_scores(r: np.ndarray) -> bool:
    if r.ndim != 2 or r.shape[0] == 0 or r.shape[1] < 2:
        return False
    return not (r.min() < 0 and np.allclose(np.linalg.norm(r, axis=1), 1, atol=1e-3))


def _agreement(r: np.ndarray, y: np.ndarray) -> tuple[int, int, int | None]:
    """Rows with a finite best score, how many choose the same class, and how many have it among their best five."""
    best = r.max(axis=1)
    counted = np.isfinite(best)
    r, y, best = r[counted], y[counted], best[counted]
    rows, sane = np.arange(len(r)), ~np.isnan(y).any(axis=1)
    tie = 4 * np.finfo(np.float32).eps * np.abs(best)
    top1 = int(np.count_nonzero(sane & (r[rows, y.argmax(axis=1)] >= best - tie)))
    if r.shape[1] <= 5:
        return len(r), top1, None
    rank = np.count_nonzero(y >= y[rows, r.argmax(axis=1)][:, None], axis=1)
    return len(r), top1, int(np.count_nonzero(sane & (rank <= 5)))


def _worst(pick: Callable[[Iterable[float]], float], values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    if any(math.isnan(value) for value in known):
        return math.nan
    return pick(known) if known else None


def _json(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
