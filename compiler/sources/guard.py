"""Where code that is not ours runs: users' factories and models, torch's exporters. It may raise or print anything."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import tempfile
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
    out, err = _Sink(sys.stdout), _Sink(sys.stderr)
    handlers = _terminal_handlers()
    streams = [handler.stream for handler in handlers]
    for handler in handlers:
        handler.stream = err  # setStream would flush the old stream, which may be closed
    try:
        with (
            _native_stdout(out),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            warnings.catch_warnings(),
        ):
            warnings.showwarning = lambda message, kind, *_: print(f"{kind.__name__}: {message}", file=err)
            yield
    finally:
        for handler, stream in zip(handlers, streams, strict=True):
            handler.stream = stream
        for line in (out.getvalue() + err.getvalue()).splitlines():
            if line.strip():
                log(line.rstrip())


class _Sink(io.StringIO):
    """Takes text in place of a terminal, except what rich draws there: a progress bar goes on."""

    def __init__(self, terminal: TextIO) -> None:
        super().__init__()
        self.rich_proxied_file = getattr(terminal, "rich_proxied_file", terminal)


@contextlib.contextmanager
def _native_stdout(sink: io.StringIO) -> Iterator[None]:
    """Catches what C++ writes to file descriptor 1, as torch does with a graph that it refuses."""
    sys.stdout.flush()
    saved = os.dup(1)
    with tempfile.TemporaryFile() as file:
        try:
            os.dup2(file.fileno(), 1)
            yield
        finally:
            os.dup2(saved, 1)
            os.close(saved)
            file.seek(0)
            sink.write(file.read().decode(errors="replace"))


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
    """The place that raised: the last line in the user's `file`, or the last line that is not ours."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    package = __name__.partition(".")[0] + "."
    frames = [
        (frame.f_code.co_filename, line, frame.f_code.co_name)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if not frame.f_globals.get("__name__", "").startswith((package, "importlib."))
    ]
    own = [frame for frame in frames if file is not None and Path(frame[0]) == file]
    for name, line, function in (own or frames)[-1:]:
        return f"{name}:{line} in {function}"
    return str(file) if file is not None else "a line that Python does not name"
