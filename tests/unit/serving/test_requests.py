from __future__ import annotations

import json

from enginesmith.serving.requests import RequestLog, described


def trace(number: int, name: str | None, **times: int) -> list[dict[str, object]]:
    """Events as the server writes them; times in microseconds."""
    first = {"id": number, "model_name": "net", "model_version": 1}
    if name is not None:
        first["request_id"] = name
    return [first, *({"id": number, "timestamps": [{"name": k, "ns": v * 1000}]} for k, v in times.items())]


FULL = {"REQUEST_START": 0, "QUEUE_START": 50, "COMPUTE_START": 350, "COMPUTE_END": 7570, "REQUEST_END": 7600}


def test_a_request_is_told_with_its_times():
    assert described(trace(1, "a-1", **FULL)) == ["request a-1: 7.60 ms, of which 0.30 in the queue, 7.22 in the model"]


def test_a_request_that_was_refused_says_so():
    found = described(trace(1, "a-1", REQUEST_START=0, QUEUE_START=10, REQUEST_END=1500))
    assert found == ["request a-1: 1.50 ms, without reaching the model"]


def test_several_requests_of_one_file_are_kept_apart():
    found = described([*trace(1, "a", **FULL), *trace(2, None, REQUEST_START=0, REQUEST_END=1000)])
    assert [line.partition(":")[0] for line in found] == ["request a", "request without an id"]


def test_probes_are_left_out():
    assert described(trace(1, "enginesmith-probe-7", **FULL)) == []


def test_files_are_told_in_their_order_and_removed(tmp_path):
    for number in (10, 9, 2):
        (tmp_path / f"trace.{number}").write_text(json.dumps(trace(1, f"r{number}", **FULL)))
    told: list[str] = []
    RequestLog(tmp_path, 1).read(told.append)
    assert [line.split(":")[0] for line in told] == ["request r2", "request r9", "request r10"]
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_being_written_is_left_for_later(tmp_path):
    (tmp_path / "trace.0").write_text('[{"id":1,')
    told: list[str] = []
    log = RequestLog(tmp_path, 1)
    log.read(told.append)
    (tmp_path / "trace.0").write_text(json.dumps(trace(1, "late", **FULL)))
    log.read(told.append)
    assert len(told) == 1


def test_the_server_is_told_where_and_how_many(tmp_path):
    flags = RequestLog(tmp_path, 100).flags()
    assert flags[::2] == ["--trace-config"] * 5
    assert {f"triton,file={tmp_path}/trace", "rate=100", "level=TIMESTAMPS"} <= set(flags)
