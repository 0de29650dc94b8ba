"""Whether the processor's sums of 8-bit products overflow."""

from __future__ import annotations

import platform

from ..machine.environment import cpu_flags


def saturates() -> bool:
    """Whether sums of two products of 8 bits may overflow: x86 without VNNI or AMX adds them in 16 bits."""
    flags = cpu_flags()
    return platform.machine().lower() in ("x86_64", "amd64") and not flags & {"avx512_vnni", "avx_vnni", "amx_int8"}
