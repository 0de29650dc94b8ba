"""Watches how much of the processors other processes take, since that makes a measurement worthless."""

from __future__ import annotations

import time

import psutil


class ForeignCpu:
    """Share of all processors that processes other than this one and its children took since `start`."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self.start()

    def start(self) -> None:
        """Begins a stretch."""
        self._time = time.perf_counter()
        self._all = self._busy()
        self._own = self._mine()

    def share(self) -> float:
        """0 to 1. The kernel counts in hundredths of a second, so a stretch below 0.1 s tells little."""
        available = (time.perf_counter() - self._time) * (psutil.cpu_count() or 1)
        foreign = (self._busy() - self._all) - (self._mine() - self._own)
        return min(1.0, max(0.0, foreign / available))

    @staticmethod
    def _busy() -> float:
        times = psutil.cpu_times()
        return float(times.user + times.system)

    def _mine(self) -> float:
        own = self._process.cpu_times()
        total = own.user + own.system
        for child in self._process.children(recursive=True):
            try:
                times = child.cpu_times()
            except psutil.Error:  # it ended meanwhile, and its time with it
                continue
            total += times.user + times.system
        return float(total)
