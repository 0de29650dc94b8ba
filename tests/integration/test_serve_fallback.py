"""`enginesmith serve` by the kserve package, where no Triton can run."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tritonclient.grpc")

import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

TESTS = Path(__file__).parents[1]
helpers = {name: runpy.run_path(str(TESTS / f"{name}.py")) for name in ("serving_load", "serving_process")}
Load, infer_input = (helpers["serving_load"][name] for name in ("Load", "infer_input"))
Served = helpers["serving_process"]["Served"]
write_bundle = runpy.run_path(str(TESTS / "small_bundles.py"))["write_bundle"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("kserve") is None, reason="kserve is not installed"),
    pytest.mark.skipif(importlib.util.find_spec("pytriton") is not None, reason="a Triton can run here"),
]


def test_it_answers_refuses_recovers_and_stops(tmp_path):
    bundle = write_bundle(tmp_path / "net", times_ms={"plain": 1.0})
    served = Served(bundle, tmp_path, "--probe-s", "1")
    client = triton.InferenceServerClient(served.url)
    try:
        assert served.info["server"] == "kserve, without merging"
        assert "does not merge requests" in served.log()
        for name, shape, message in (
            ("x", (1, 5), "input 'x' has the wrong shape"),
            ("z", (1, 4), "input 'x' is missing"),
            ("x", (9, 4), "input 'x' has the wrong shape"),
        ):
            with pytest.raises(InferenceServerException, match=message) as refused:
                client.infer(served.model, [infer_input(np.zeros(shape, np.float32), name)], client_timeout=5)
            assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"
        with Load(served.url, served.model) as load:
            load.wait_for(50)
            served.fallback().kill()
            served.wait_for_log("recovered: a real inference answers again after")
            load.wait_for(50)
        assert load.count("wrong") == 0
        assert all("UNAVAILABLE" in error for error in load.errors()), load.errors()
    finally:
        code = served.end()
    assert code == 0, served.log()
    assert served.leftovers() == []
