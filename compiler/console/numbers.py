"""Options that take several numbers."""

from __future__ import annotations

from ...errors import UsageError


def parse_numbers(option: str, text: str | None) -> tuple[int, ...]:
    """Numbers with commas between; none where nothing was given.

    Raises:
        UsageError: the text holds something else.
    """
    try:
        return tuple(int(number) for number in text.split(",")) if text else ()
    except ValueError as error:
        raise UsageError(f"{option} {text!r} cannot be read", expected="numbers with commas between, as 0,1") from error
