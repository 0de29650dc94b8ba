"""A language model as a service with a draft: the tokens of greedy search, and metrics of what the draft brought."""

from __future__ import annotations

import re
import runpy
import threading
import urllib.request
from pathlib import Path

import pytest

import enginesmith

pytest.importorskip("tritonclient.grpc")

HELPERS = Path(__file__).parents[1]
Served = runpy.run_path(str(HELPERS / "serving_process.py"))["Served"]
small = runpy.run_path(str(HELPERS / "small_decoder.py"))

pytestmark = pytest.mark.slow
PROMPT = [3, 1, 4]


def counters(served) -> dict[str, int]:
    text = urllib.request.urlopen(served.info["metrics"]).read().decode()
    return {name: int(float(value)) for name, value in re.findall(r"^enginesmith_draft_(\w+){.*} (\S+)$", text, re.M)}


def test_requests_alone_and_together_with_a_draft(tmp_path):
    engine = small["write_bundle"](tmp_path / "engine", drafted=3)
    draft = small["write_bundle"](tmp_path / "draft")
    served = Served(engine, tmp_path, "--draft", str(draft), "--draft-engine", "decoder")
    try:
        found = []

        def ask(count, **options):
            with enginesmith.Client(served.url, served.model, deadline_s=60) as client:
                found.append(list(client.generate(PROMPT, count, **options)) == small["greedy"](PROMPT, count))

        ask(9)
        after = counters(served)
        assert after == {"proposed": 6, "accepted": 6, "calls": 2, "tokens": 8}
        ask(9, top_k=1)  # drawn, though from one token
        assert counters(served) == after
        threads = [threading.Thread(target=ask, args=(3 + number % 8,)) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [True] * 14
    finally:
        assert served.end() == 0, served.log()
