"""A server that runs `enginesmith` in forks of itself, which has imported what commands need: torch takes seconds.

Each command is a process of its own as in a shell, with its own arguments, environment, folder and streams.

    python forked.py SOCKET      serves until its standard input ends
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys

IMPORTED = (
    "enginesmith.cli",
    "enginesmith.compiler.pipeline",
    "onnxruntime",
    "torch.export._trace",
    "torch.onnx._internal.exporter._core",
    "onnxscript.function_libs.torch_lib.ops",
    "transformers.modeling_utils",
)

COMMAND = f"""#!{sys.executable} -IS
import json, os, socket, sys

with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
    server.connect({{socket!r}})
    what = {{{{"arguments": sys.argv, "environment": dict(os.environ), "folder": os.getcwd()}}}}
    socket.send_fds(server, [json.dumps(what).encode()], [0, 1, 2])
    sys.exit(int(server.recv(16) or 255))
"""
"""The command that has a fork run its arguments, and ends as that does."""

LONGEST = 1 << 17
"""Bytes of arguments and environment."""


def main() -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(sys.argv[1])
        listener.listen()
        print("ready", flush=True)
        connection = _forked(listener)
    if connection is not None:
        _run(connection)


def _forked(listener: socket.socket) -> socket.socket | None:
    """In a fork for each command, its connection; in the server None, at the end."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while sys.stdin not in (ready := select.select([listener, sys.stdin], [], [])[0]):
        assert ready
        connection, _ = listener.accept()
        if os.fork() == 0:
            return connection
        connection.close()
    return None


def _run(connection: socket.socket) -> None:
    """Runs the command in a fork again, and tells how that ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    data, streams, _, _ = socket.recv_fds(connection, LONGEST, 3)
    what = json.loads(data)
    if command := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(command, 0)[1])
        with contextlib.suppress(OSError):
            connection.send(str(code if code >= 0 else 128 - code).encode())
        os._exit(0)
    connection.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(what["folder"])
    os.environ.clear()
    os.environ.update(what["environment"])
    sys.argv = what["arguments"]
    try:
        importlib.import_module("enginesmith.cli").main()
    except SystemExit as end:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(end.code or 0))  # libraries would wait for threads that only the server has


if __name__ == "__main__":
    main()
