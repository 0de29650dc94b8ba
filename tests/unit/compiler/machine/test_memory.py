"""What is left, by the system and by control groups of both versions."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from enginesmith.compiler.machine import memory
from enginesmith.compiler.machine.memory import available_bytes, total_bytes


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 1000 bytes, 800 of them free, whose control groups are in a folder of this test."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=1000, available=800))
    monkeypatch.setattr(memory, "_ROOT", tmp_path)
    monkeypatch.setattr(memory, "_PROC", tmp_path / "cgroup")
    return tmp_path


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / f"memory.{name}").write_text(f"{value}\n")


def test_without_control_groups_the_system_tells(groups: Path) -> None:
    assert (available_bytes(), total_bytes()) == (800, 1000)
    (groups / "cgroup").write_text("0::/absent\n")
    assert (available_bytes(), total_bytes()) == (800, 1000)


def test_the_tightest_group_of_version_2_counts_and_cache_is_free(groups: Path) -> None:
    (groups / "cgroup").write_text("0::/a/b\n")
    write(groups / "a", max=500, current=450, stat="anon 100\ninactive_file 150")
    write(groups / "a/b", max="max", current=450, stat="anon 1")
    assert (available_bytes(), total_bytes()) == (200, 500)
    write(groups / "a/b", max=460)
    assert (available_bytes(), total_bytes()) == (10, 460)


def test_version_1(groups: Path) -> None:
    (groups / "cgroup").write_text("9:cpu,cpuacct:/x\n4:memory:/job\n0::/\n")
    write(groups / "memory/job", limit_in_bytes=300, usage_in_bytes=290, stat="inactive_file 1\ntotal_inactive_file 40")
    assert (available_bytes(), total_bytes()) == (50, 300)


def test_a_container_sees_its_own_group_at_the_root(groups: Path) -> None:
    (groups / "cgroup").write_text("0::/docker/1234\n")
    write(groups, max=400, current=100, stat="inactive_file 0")
    assert (available_bytes(), total_bytes()) == (300, 400)


def test_more_in_use_than_allowed_leaves_nothing(groups: Path) -> None:
    (groups / "cgroup").write_text("0::/\n")
    write(groups, max=400, current=450, stat="inactive_file 0")
    assert available_bytes() == 0


def test_on_this_machine() -> None:
    assert 0 < available_bytes() <= total_bytes()
