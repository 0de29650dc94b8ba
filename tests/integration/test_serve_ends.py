"""`enginesmith serve` with TLS, and how it ends: told to stop, and killed."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tritonclient.grpc")

import tritonclient.grpc as triton

import enginesmith
from enginesmith.errors import EngineError

TESTS = Path(__file__).parents[1]
helpers = {name: runpy.run_path(str(TESTS / f"{name}.py")) for name in ("serving_load", "serving_process")}
Load, ask = (helpers["serving_load"][name] for name in ("Load", "ask"))
Served = helpers["serving_process"]["Served"]
write_bundle = runpy.run_path(str(TESTS / "small_bundles.py"))["write_bundle"]

pytestmark = pytest.mark.slow
X = np.ones((2, 4), np.float32)


def certificate(folder: Path, name: str = "cert", of: str = "DNS:here.example") -> tuple[Path, Path]:
    cert, key = folder / f"{name}.pem", folder / f"{name}-key.pem"
    command = f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=here -keyout {key} -out {cert}"
    subprocess.run([*command.split(), "-addext", f"subjectAltName={of}"], check=True, capture_output=True)
    return cert, key


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl to make a certificate with")
def test_a_server_with_tls_answers_who_trusts_it_and_stops_cleanly(tmp_path):
    bundle = write_bundle(tmp_path / "net", times_ms={"plain": 1.0})
    cert, key = certificate(tmp_path)
    served = Served(bundle, tmp_path, "--tls-cert", str(cert), "--tls-key", str(key), "--probe-s", "0.2")
    try:
        name = [("grpc.ssl_target_name_override", "here.example")]
        trusting = triton.InferenceServerClient(served.url, ssl=True, root_certificates=str(cert), channel_args=name)
        assert ask(trusting, served.model, X).outcome == "right"
        plain = ask(triton.InferenceServerClient(served.url), served.model, X, timeout_s=3)
        assert plain.outcome == "error"
        assert served.info["tls"]
    finally:
        code = served.end()
    assert code == 0, served.log()
    assert "trouble" not in served.log()
    assert served.leftovers() == []


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl to make a certificate with")
def test_a_server_that_asks_for_certificates_takes_only_clients_that_have_one(tmp_path):
    bundle = write_bundle(tmp_path / "net", times_ms={"plain": 1.0})
    (cert, key), own = certificate(tmp_path, "server", "IP:127.0.0.1"), certificate(tmp_path, "client")
    roots = tmp_path / "roots.pem"
    roots.write_text(cert.read_text() + own[0].read_text())
    tls = ("--tls-cert", str(cert), "--tls-key", str(key), "--tls-client-ca", str(roots))
    served = Served(bundle, tmp_path, *tls)
    try:
        with enginesmith.Client(served.url, served.model, root=cert, cert=own[0], key=own[1]) as client:
            assert client(x=X)["left"].shape == (2, 3)
        with (
            enginesmith.Client(served.url, served.model, root=cert, deadline_s=2) as stranger,
            pytest.raises(EngineError, match=r"did not answer|no answer from"),
        ):
            stranger(x=X)
    finally:
        code = served.end()
    assert code == 0, served.log()


def test_http_is_there_where_it_is_asked_for_and_restricted_likewise(tmp_path):
    bundle = write_bundle(tmp_path / "net", times_ms={"plain": 1.0})
    served = Served(bundle, tmp_path, "--http-port", "0")
    try:
        url = f"{served.info['http']}/v2"
        body = {"inputs": [{"name": "x", "shape": [2, 4], "datatype": "FP32", "data": X.ravel().tolist()}]}
        asked = urllib.request.Request(f"{url}/models/{served.model}/infer", json.dumps(body).encode())
        with urllib.request.urlopen(asked, timeout=10) as answer:
            assert {output["name"] for output in json.loads(answer.read())["outputs"]} == {"left", "right"}
        for what in (f"repository/models/{served.model}/unload", "repository/index", "logging"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(urllib.request.Request(f"{url}/{what}", b"{}"), timeout=10)
            assert refused.value.code == 403
        with urllib.request.urlopen(f"{url}/health/ready", timeout=10) as answer:
            assert answer.status == 200
    finally:
        served.end()


def test_a_killed_supervisor_takes_its_server_along_once_that_has_answered(tmp_path):
    bundle = write_bundle(tmp_path / "net", {"slow": "slow"}, times_ms={"slow": 1.0})
    served = Served(bundle, tmp_path)
    with Load(served.url, served.model, threads=6) as load:
        load.wait_for(20)
        assert len(served.leftovers()) >= 4  # a folder, shared memory, the server, its model
        asked_at = time.monotonic()
        served.process.kill()
        served.process.wait()
        deadline = time.monotonic() + 30
        while served.leftovers() and time.monotonic() < deadline:
            time.sleep(0.1)
    assert served.leftovers() == []
    assert load.unanswered(asked_at) == []
    assert load.count("wrong") == 0
