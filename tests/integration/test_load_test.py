"""`enginesmith serve` under `enginesmith load-test`, and clients of two servers, of one bundle or of two."""

from __future__ import annotations

import json
import runpy
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("tritonclient.grpc")

from tritonclient.grpc import service_pb2

import enginesmith
from enginesmith.cli import cli

TESTS = Path(__file__).parents[1]
Served = runpy.run_path(str(TESTS / "serving_process.py"))["Served"]
small = runpy.run_path(str(TESTS / "small_bundles.py"))
example = runpy.run_path(str(TESTS / "unit" / "compiler" / "manifest_example.py"))["example"]

pytestmark = pytest.mark.slow
X = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """With everything in its manifest that a report is made of."""
    found = small["write_bundle"](tmp_path_factory.mktemp("bundle") / "net", {"best": "good"}, times_ms={"best": 0.1})
    manifest = json.loads((found / "manifest.json").read_text())
    whole = {**example(), **manifest, "source": example()["source"]}
    whole["engines"] = [{**example()["engines"][0], **manifest["engines"][0], "validation": None}]
    timing = manifest["benchmark"]["timings"][0]
    one = {**example()["benchmark"]["timings"][0], **timing, "sizes": {"batch": 4}, "speed_up": None}
    whole["benchmark"] = {**example()["benchmark"], "timings": [one]}
    (found / "manifest.json").write_text(json.dumps(whole))
    return found


@pytest.fixture(scope="module")
def served(bundle, tmp_path_factory):
    found = Served(bundle, tmp_path_factory.mktemp("served"), "--queue-delay-us", "20000")  # so that all is merged
    yield found
    assert found.end() == 0


def load_test(served, bundle, *options):
    arguments = ["load-test", served.url, "--bundle", str(bundle), "--duration", "1", "--warmup", "0.2", "--json"]
    ran = CliRunner().invoke(cli, [*arguments, *options], standalone_mode=False)
    assert ran.stdout, ran.output
    return ran.return_value, json.loads(ran.stdout)


def test_answers_are_checked_and_merging_and_overhead_are_told(served, bundle):
    code, result = load_test(served, bundle, "--clients", "1,32", "--rate", "30", "--batch", "4")
    assert code == 0, result["problems"]
    one, many = result["closed"]
    assert result["payload"]["checked"]
    assert not one["errors"]
    assert not many["errors"]
    assert one["server"]["merged"] == pytest.approx(4, abs=0.4)
    assert many["server"]["merged"] > 6
    assert result["engine"]["p50_ms"] == 0.1
    assert result["overhead_ms"] == pytest.approx(one["percentiles"][0]["ms"] - 0.1)


def test_a_result_that_is_recorded_stands_in_the_bundle_and_its_report(served, bundle):
    for clients in ("1", "2"):  # the second takes the place of the first
        load_test(served, bundle, "--clients", clients, "--batch", "4", "--duration", "0.3", "--record")
    (record,) = json.loads((bundle / "manifest.json").read_text())["services"]
    assert (record["served"], record["payload"]["rows"], record["closed"][0]["clients"]) == ("best", 4, 2)
    report = (bundle / "report.html").read_text()
    assert "best, 4 rows a request" in report
    assert "2 clients" in report


def test_wrong_answers_are_found(served, bundle, tmp_path):
    other = small["write_bundle"](tmp_path / "net", {"best": "good"}, times_ms={"best": 0.1})
    with np.load(other / "reference" / "outputs.npz") as stored:
        changed = {name: 1.2 * stored[name] for name in stored.files}
    np.savez(other / "reference" / "outputs.npz", **changed)
    code, result = load_test(served, other, "--clients", "2")
    assert code == 1
    assert "wrong answers at 2 clients" in result["problems"][0]


def test_clients_lose_nothing_when_one_of_two_servers_is_killed(served, bundle, tmp_path):
    other = Served(bundle, tmp_path)
    answers, errors, stop = [], [], threading.Event()

    def ask(client):
        try:
            while not stop.is_set():
                answers.append(bool(np.allclose(client(x=X)["left"], small["network"](X)["left"], atol=1e-5)))
        except enginesmith.errors.EnginesmithError as error:
            errors.append(str(error))

    try:
        with enginesmith.Client([served.url, other.url], "net", deadline_s=30) as client:
            threads = [threading.Thread(target=ask, args=(client,)) for _ in range(4)]
            for thread in threads:
                thread.start()
            _wait(lambda: len(answers) > 100)
            other.server().kill()
            other.wait_for_log("recovered")
            count = len(answers)
            _wait(lambda: len(answers) > count + 100)
            stop.set()
            for thread in threads:
                thread.join()
    finally:
        stop.set()
        other.end()
    assert not errors
    assert all(answers)


def test_two_bundles_of_a_model_share_the_traffic_and_are_counted_apart(served, tmp_path):
    changed = small["write_bundle"](tmp_path / "net", times_ms={"plain": 1.0}, w=2 * small["W"])
    other = Served(changed, tmp_path, "--probe-s", "600")
    try:
        arms = {"old": (enginesmith.Client(served.url, "net"), 0.7), "new": (enginesmith.Client(other.url, "net"), 0.3)}
        weights = {"old": small["W"], "new": 2 * small["W"]}
        with enginesmith.Split(arms, experiment="weights") as split:
            before = _answered(arms["new"][0])
            futures = {key: split.submit({"x": X}, key=key) for key in range(200)}
            for key, future in futures.items():
                outputs, arm = future.result()
                assert arm == split.arm(key)
                np.testing.assert_allclose(outputs["left"], small["network"](X, weights[arm])["left"], atol=1e-5)
            results = split.results()
            assert _answered(arms["new"][0]) - before == results["new"].calls
        expected = sum(split.arm(key) == "new" for key in range(200))
        assert (results["old"].calls, results["new"].calls) == (200 - expected, expected)
        assert {name for name, found in results.items() if found.errors} == set()
        for found in results.values():
            milliseconds = [percentile.ms for percentile in found.percentiles]
            assert 0 < milliseconds[0] <= milliseconds[-1]
            assert milliseconds == sorted(milliseconds)
        with enginesmith.Split({"old": (enginesmith.Client(served.url, "net"), 1.0)}, experiment="alone") as split:
            for key in range(8):
                split.submit({"x": X}, key=key).result()
            assert split.results()["old"].percentiles[0].ms > 20  # a request that is alone waits so long for others
    finally:
        assert other.end() == 0


def _answered(client):
    """Requests that a server has answered."""
    message = service_pb2.ModelStatisticsRequest(name="net")
    (stats,) = client._stub.ModelStatistics(message).model_stats
    return stats.inference_stats.success.count


def _wait(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
