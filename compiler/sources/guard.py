"""Where code that is not ours runs: users' factories and models, torch's exporters. It may raise or print anything."""

from __future__ import annotations

import contextlib
import io
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from ...errors import EnginesmithError

Log = Callable[[str], None]


def discard(line: str) -> None:
    """A log that keeps nothing."""


@contextlib.contextmanager
def foreign(translate: Callable[[BaseException], EnginesmithError]) -> Iterator[None]:
    """Turns whatever the code inside raises into the error that `translate` makes of it."""
    try:
        yield
    except EnginesmithError:
        raise
    except (Exception, SystemExit) as error:
        raise translate(error) from error


@contextlib.contextmanager
def quiet(log: Log = discard) -> Iterator[None]:
    """Sends what the code inside prints, warns and logs to `log` instead of the terminal."""
    text = io.StringIO()
    handlers = _terminal_handlers()
    streams = [handler.setStream(text) for handler in handlers]
    try:
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text), warnings.catch_warnings():
            yield
    finally:
        for handler, stream in zip(handlers, streams, strict=True):
            if stream is not None:
                handler.setStream(stream)
        for line in text.getvalue().splitlines():
            if line.strip():
                log(line.rstrip())


def _terminal_handlers() -> list[logging.StreamHandler[TextIO]]:
    """Handlers that write to a terminal; they hold the stream itself, so that redirecting does not reach them."""
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    handlers = {h for logger in loggers if isinstance(logger, logging.Logger) for h in logger.handlers}
    streams = [h for h in handlers if isinstance(h, logging.StreamHandler) and not isinstance(h, logging.FileHandler)]
    return [h for h in streams if h.stream is not None]  # torch has one that opens a file of its own when it must


def first_line(error: BaseException) -> str:
    """Type and first telling line of an error."""
    lines = [line.strip() for line in str(error).splitlines()]
    line = next((line for line in lines if any(c.isalnum() for c in line)), "")
    name = type(error).__name__
    return f"{name}: {line[:300]}" if line else name


def where(error: BaseException, file: Path | None = None) -> str:
    """The place that raised: the last line in the user's `file`, or the last line of all; empty where there is none."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if file is not None and Path(frame.filename) == file]
    frame = (own or list(frames))[-1:]
    return f"{frame[0].filename}:{frame[0].lineno} in {frame[0].name}" if frame else ""
