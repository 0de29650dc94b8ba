"""Whether an engine may run on this machine."""

from __future__ import annotations

import platform

from ...errors import EngineMismatchError
from ...targets.base import EngineInfo, Target
from . import environment

_MACHINE = ("compute_capability", "machine", "cpu_flags")


_HINT = "compile the bundle's recipe again on this machine: enginesmith compile --recipe recipe.yaml"


def check_machine(info: EngineInfo, target: Target, hint: str = _HINT) -> None:
    """Compares what the engine requires with this machine.

    `EngineInfo.requires` may hold ``compute_capability`` (one, or several with commas between), ``machine`` (x86_64),
    ``cpu_flags`` (all of them needed, with spaces between) and the names in the target's `versions`, each with as much
    of the version as matters ("8.6" accepts 8.6.1).

    Raises:
        EngineMismatchError: the first thing that does not hold.
    """
    for key, needed in info.requires.items():
        found = _found(key, needed, target)
        if not _holds(key, needed, found):
            raise EngineMismatchError(
                f"engine {info.name} was built for another {'machine' if key in _MACHINE else 'version'}",
                expected=f"{key.replace('_', ' ')} {needed.replace(',', ' or ')}",
                found=found or "none",
                hint=hint,
            )


def devices(info: EngineInfo, target: Target) -> tuple[str, ...]:
    """Where an engine runs: as its target was told, or where its target always runs."""
    chosen = str(info.options.get("device") or "").partition(":")[0]
    return (chosen,) if chosen in target.capabilities.devices else target.capabilities.devices


def _found(key: str, needed: str, target: Target) -> str:
    if key == "compute_capability":
        return environment.compute_capability(getattr(target, "device_id", 0)) or ""
    if key == "machine":
        return platform.machine()
    if key == "cpu_flags":
        flags = environment.cpu_flags()
        return " ".join(flag for flag in needed.split() if flag in flags)
    return target.versions().get(key, "")


def _holds(key: str, needed: str, found: str) -> bool:
    if key == "compute_capability":
        return found in needed.split(",")
    if key == "cpu_flags":
        return found.split() == needed.split()
    if key == "machine":
        return found == needed
    parts = needed.split(".")
    return found.split(".")[: len(parts)] == parts
