"""How much memory is left for this process and its children, by the system and by the control groups around it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

_PROC = Path("/proc/self/cgroup")
_ROOT = Path("/sys/fs/cgroup")
_FILES = {"": ("memory.max", "memory.current"), "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes")}
"""Files of the limit and of what is used, by the controller: version 2 has one hierarchy, without a name."""


def available_bytes() -> int:
    """What can be taken before the system swaps or a control group kills."""
    rooms = [limit - used for limit, used in _groups()]
    return max(0, min([psutil.virtual_memory().available, *rooms]))


def total_bytes() -> int:
    """What the system has, or the tightest control group allows."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _groups())])


def _groups() -> Iterator[tuple[int, int]]:
    """Limit and use, the page cache that can be dropped left out, of every control group with a limit."""
    try:
        lines = _PROC.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for controller in {"", "memory"} & set(controllers.split(",")):
            folder = _ROOT / controller / path.strip("/")
            while folder.is_relative_to(_ROOT / controller):
                yield from _limit(folder, *_FILES[controller])
                folder = folder.parent


def _limit(folder: Path, limit: str, used: str) -> Iterator[tuple[int, int]]:
    try:
        text = (folder / limit).read_text().strip()
        if text == "max":
            return
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        cache = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
        yield int(text), int((folder / used).read_text()) - cache
    except (OSError, ValueError):  # no such group here: a container sees the files of its own at the root
        return
