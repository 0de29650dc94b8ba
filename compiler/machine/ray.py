"""Ray, where it is installed: one's own on this machine, or a cluster."""

from __future__ import annotations

import importlib
import logging
import os

from ...errors import TargetUnavailableError, UsageError

LOCAL = "local"
"""Address that stands for a Ray of one's own."""


def require_ray(module: str, what: str, otherwise: str) -> None:
    """Raises TargetUnavailableError where a module of Ray cannot be imported.

    Args:
        what: needs it.
        otherwise: what does without.
    """
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise TargetUnavailableError(
            f"{what} needs Ray, which is not installed",
            found=error,
            hint=f"pip install 'enginesmith[ray]'; {otherwise}",
        ) from error


def connect(address: str) -> bool:
    """Joins a cluster, or starts a Ray of one's own; does nothing where this process has joined one already.

    Returns:
        Whether it did, so that it has to be shut down in the end.

    Raises:
        UsageError: no Ray answers.
    """
    import ray

    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # it warns of what Ray Data does
    place = {} if address == LOCAL else {"address": address}
    try:
        ray.init(**place, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"no Ray answers at {address!r}", found=error, hint="`ray status` shows the address of a cluster"
        ) from error
    return True


def reason(error: BaseException) -> str:
    """The last line of one of Ray's errors, which says what happened; those before are its stack."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
