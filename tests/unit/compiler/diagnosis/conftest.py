from __future__ import annotations

from collections.abc import Callable

import pytest

from enginesmith.compiler.diagnosis.ceilings import Ceilings

GPU = {"gflops": {"fp32": 50_000.0, "fp16": 700_000.0, "int8": 1_400_000.0}, "unaligned_gflops": {"fp16": 140_000.0}}


@pytest.fixture(scope="session")
def cpu() -> Ceilings:
    """100 GFLOP/s; 100 GB/s up to a megabyte, 10 GB/s from a hundred on; 1 us."""
    return Ceilings(
        device="cpu",
        name="a processor",
        gflops={"fp32": 100.0, "bf16": 200.0, "int8": 400.0},
        unaligned_gflops={"fp32": 50.0},
        bandwidths=((1e6, 100.0), (1e8, 10.0)),
        launch_us=1.0,
    )


@pytest.fixture(scope="session")
def gpu() -> Callable[..., Ceilings]:
    """3000 GB/s, 4 us a launch and 1 us within a CUDA graph."""

    def make(**more: object) -> Ceilings:
        bandwidths = ((1e6, 3000.0), (1e9, 3000.0))
        facts = {"launch_us": 4.0, "graph_launch_us": 1.0, "transfer_gb_s": 50.0, "bandwidths": bandwidths}
        return Ceilings(**{"device": "cuda", "name": "a GPU", **GPU, **facts, **more})  # type: ignore[arg-type]

    return make
