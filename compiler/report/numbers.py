"""Numbers as people read them: three significant digits, units, and words where a number does not exist."""

from __future__ import annotations

import math
from collections.abc import Callable

ABSENT = "—"
TIMES = "\N{MULTIPLICATION SIGN}"
MINUS = "\N{MINUS SIGN}"


def positive(value: float | None) -> float | None:
    """The value where it is one that a measurement may have, and that can stand on a logarithmic axis."""
    return value if value is not None and 1e-30 < value < 1e30 else None


def number(value: float | int | None, digits: int = 3) -> str:
    """So many significant digits, thousands separated: 0.842, 12.3, 1,234."""
    if value is None:
        return ABSENT
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else f"{MINUS}∞"
    # Rounded before its digits are counted: 99.96 is 100, not 100.0.
    rounded = float(f"{value:.{digits}g}")
    if isinstance(value, int) or abs(rounded) >= 10 ** (digits - 1) or rounded == 0:
        return f"{value:,.0f}"
    if abs(rounded) < 0.001:
        return _scientific(value)
    return f"{value:.{digits - 1 - math.floor(math.log10(abs(rounded)))}f}"


def error(value: float | None) -> str:
    """A difference from the reference, which spans many orders of magnitude: 1.2e-7."""
    if value is None or not math.isfinite(value) or value == 0 or abs(value) >= 0.01:
        return number(value)
    return _scientific(value)


def cosine(value: float | None) -> str:
    """A cosine with its distance from 1 readable however small: 0.9987, 0.99999, 1 - 3.1e-9."""
    if value is None or not math.isfinite(value) or value == 1:
        return number(int(value) if value == 1 else value)
    if float(short := f"{value:.6g}") == value:
        return short
    return f"1 {MINUS} {_scientific(1 - value)}" if 0 < 1 - value < 1e-4 else f"{value:.4f}"


def percent(value: float | None) -> str:
    """A percentage that is already one: 87.5 %."""
    return number(value) if value is None or not math.isfinite(value) else f"{value:.4g} %"


def share(value: float | None) -> str:
    """A share of 1 as a percentage, never rounded up to 100 %: 0.99996 is 99.996 %."""
    if value is None or not math.isfinite(value):
        return number(value)
    digits = 1 if value >= 1 or value < 0.999 else max(1, math.ceil(-math.log10(1 - value)) - 2)
    return f"{100 * value:.{digits}f} %".replace(".0 %", " %")


def ratio(value: float | None) -> str:
    """A speed-up with its sign of multiplication: 3.42x, 12.5x, 130x."""
    if value is None or not math.isfinite(value):
        return number(value)
    return f"{value:,.{2 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f}{TIMES}"


def seconds(value: float | None) -> str:
    """A duration with the unit that suits it: <1 ms, 84 ms, 1.24 s, 2 min 5 s."""
    if value is None or not math.isfinite(value):
        return number(value)
    if 0 < value < 0.001:
        return "<1 ms"
    if 0 < abs(value) < 0.1:
        return f"{number(value * 1000)} ms"
    if abs(value) < 100:
        return f"{number(value)} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s"


def size(value: float | None) -> str:
    """Bytes in decimal units: 814 kB, 3.20 GB."""
    if value is None or not math.isfinite(value):
        return number(value)
    scaled, unit = float(value), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(scaled) < 999.5 or unit == "TB":
            break
        scaled /= 1000
    return f"{number(round(scaled) if unit == 'B' else scaled)} {unit}"


UNITS: dict[str, Callable[[float | int | None], str]] = {
    "_bytes": size,
    "_percent": percent,
    "_ms": lambda value: f"{number(value)} ms",
    "_mhz": lambda value: f"{number(value)} MHz",
    "_s": seconds,
}
"""How to show a number by the end of its name."""


def _scientific(value: float) -> str:
    text = f"{value:.0e}"
    mantissa, _, exponent = (text if float(text) == value else f"{value:.1e}").partition("e")
    return f"{mantissa}e{int(exponent)}"
