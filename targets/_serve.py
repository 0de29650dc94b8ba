"""The other side of `_worker`: a process of this package that answers its parent's requests."""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, TextIO

from ..errors import EngineError

_START = "import sys; sys.path[:] = sys.argv[1:]; from {module} import main; main()"


def command(module: str) -> list[str]:
    """The command that runs `main` of a module: this interpreter, which finds the same modules."""
    return [sys.executable, "-c", _START.format(module=module), *sys.path]


def serve(commands: object, clean: Callable[[], None] = lambda: None) -> None:
    """Answers requests until the parent closes stdin; an error is answered, and ends the process.

    Args:
        commands: every public method is a command, and its arguments are the request's.
        clean: what to do last where the parent has gone, in another thread than the commands'.
    """
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not reach the channel
    sys.stdout = sys.stderr

    def fail(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        from ..compiler.sources.guard import first_line

        traceback.print_exception(kind, error, trace)
        message = error.message if isinstance(error, EngineError) else first_line(error)
        _answer(channel, "error", {"kind": "failed", "message": message})
        sys.stderr.flush()
        os._exit(1)  # an orderly exit would wait for the thread that reads stdin

    sys.excepthook = fail
    requests: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_listen, args=(requests, clean), daemon=True).start()
    while True:
        request = requests.get()
        _answer(channel, "result", getattr(commands, request.pop("command"))(**request))


def _answer(channel: TextIO, kind: str, value: Any) -> None:
    channel.write(json.dumps({kind: value}) + "\n")
    channel.flush()


def _listen(requests: queue.Queue[dict[str, Any]], clean: Callable[[], None]) -> None:
    for line in sys.stdin:
        requests.put(json.loads(line))
    clean()
    os._exit(1)  # the parent is gone, and the main thread may be deep in native code
