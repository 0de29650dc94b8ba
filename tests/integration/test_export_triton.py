"""`enginesmith export-triton`, and a server that is started on what it wrote."""

from __future__ import annotations

import json
import runpy
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("tritonclient.grpc")

import enginesmith
from enginesmith.cli import cli
from enginesmith.serving.endpoint import Endpoint
from enginesmith.serving.triton import find

TESTS = Path(__file__).parents[1]
small = runpy.run_path(str(TESTS / "small_bundles.py"))

pytestmark = pytest.mark.slow


class Tagger(torch.nn.Module):
    """Two inputs with a second dynamic axis, and a number for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(50, 8)
        self.out = torch.nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor, keep: torch.Tensor, scale: torch.Tensor):
        scores = self.out(self.table(ids)) * scale[:, None, None] * keep[..., None]
        return {"scores": scores, "best": scores.argmax(-1), "long": keep.sum(1)}


class Fixed(torch.nn.Module):
    """No batch axis, and half precision."""

    def forward(self, x: torch.Tensor):
        return 2 * x


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    options = {"targets": ["onnxruntime-cpu"], "precisions": ["fp32"], "benchmark": False}
    ids = np.random.default_rng(0).integers(0, 50, (16, 6))
    np.savez(folder / "data.npz", ids=ids, keep=ids > 10, scale=np.linspace(1, 2, 16, dtype=np.float32))
    torch.manual_seed(0)
    enginesmith.compile(
        Tagger().eval(),
        folder / "tagger",
        inputs=["ids:4x6:int64", "keep:4x6:bool", "scale:4"],
        dynamic=["ids:0=1..4..32", "keep:0=1..4..32", "scale:0=1..4..32",
                 "ids:1=length@1..6..12", "keep:1=length@1..6..12"],
        data=str(folder / "data.npz"),
        **options,
    )  # fmt: skip
    enginesmith.compile(Fixed().eval(), folder / "fixed", inputs=["x:2x3:float16"], **options)
    return folder


def export(bundle: Path, models: Path, *options: str) -> dict:
    ran = CliRunner().invoke(
        cli, ["export-triton", str(bundle), str(models), "--json", *options], standalone_mode=False
    )
    assert ran.return_value == 0, ran.output
    result = json.loads(ran.stdout)
    assert result["checks"]["protobuf"] == "passed"
    assert result["checks"]["server"].startswith("passed")
    return result


@pytest.fixture(scope="module")
def url(bundles, tmp_path_factory):
    """A server of both models."""
    folder = tmp_path_factory.mktemp("served")
    bounds = ("--max-queue", "64", "--priorities", "2", "--instances", "2")
    assert export(bundles / "tagger", folder / "models", *bounds)["max_batch"] == 32
    fixed = export(bundles / "fixed", folder / "models")
    assert fixed["max_batch"] == 0
    assert "no input has a dynamic first axis" in fixed["reason"]
    (folder / "scratch").mkdir()
    triton, endpoint = find(folder / "scratch"), Endpoint(port=0, metrics_port=None).resolved()
    command = triton.command(folder / "models", "--disable-auto-complete-config", port=endpoint.port)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=triton.environment, stdout=log, stderr=log)
    deadline = time.monotonic() + 60
    while "Started GRPCInferenceService" not in (said := (folder / "log").read_text()):
        assert process.poll() is None, said
        assert time.monotonic() < deadline, said
        time.sleep(0.05)
    yield endpoint.url
    process.terminate()
    assert process.wait(60) == 0


def inputs(rows: int, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    ids = generator.integers(0, 50, (rows, length))
    return {"ids": ids, "keep": ids > 10, "scale": generator.random(rows, np.float32)}


def sent(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As Triton takes it, which has no scalars."""
    return {**arrays, "scale": arrays["scale"][:, None]}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_allclose(found[name].reshape(array.shape), array, rtol=1e-5, atol=1e-6)


def test_merged_requests_get_what_the_engine_gives_for_each(url, bundles):
    asked = [inputs(1 + seed % 3, 4 + seed % 2, seed) for seed in range(60)]
    with enginesmith.Client(url, "tagger") as client, enginesmith.load(bundles / "tagger") as engine:
        answers = [client.submit(sent(arrays), priority=1 + number % 2) for number, arrays in enumerate(asked)]
        for arrays, answer in zip(asked, answers, strict=True):
            assert_same(answer.result(), engine.run(arrays))


def test_a_request_that_the_model_fails_on_does_not_harm_those_merged_with_it(url, bundles):
    bad = inputs(1, 5)
    bad["ids"] = bad["ids"] + 1000  # beyond the table
    with enginesmith.Client(url, "tagger") as client, enginesmith.load(bundles / "tagger") as engine:
        for _ in range(3):
            asked = [inputs(2, 5, seed) for seed in range(12)]
            wrong = client.submit(sent(bad))
            answers = [client.submit(sent(arrays)) for arrays in asked]
            for arrays, answer in zip(asked, answers, strict=True):
                assert_same(answer.result(), engine.run(arrays))
            with pytest.raises(enginesmith.errors.EngineError, match="did not answer a call of tagger") as caught:
                wrong.result()
            assert "ONNX Runtime failed to run the engine" in caught.value.found


def test_sizes_that_the_engine_does_not_take_are_its_own_error(url):
    wrong = "the server refuses the inputs of tagger: input 'ids' has the wrong shape"
    with enginesmith.Client(url, "tagger") as client, pytest.raises(enginesmith.errors.DataError, match=wrong):
        client(sent(inputs(1, 13)))


def test_outputs_that_were_not_asked_for_are_not_sent(url):
    with enginesmith.Client(url, "tagger") as client:
        assert set(client(sent(inputs(1, 4)), outputs=["best"])) == {"best"}


def test_a_model_without_a_batch_axis(url):
    x = np.arange(6, dtype=np.float16).reshape(2, 3)
    with enginesmith.Client(url, "fixed") as client:
        (found,) = client(x=x).values()
    assert found.dtype == np.float16
    assert (found == 2 * x).all()


def test_the_native_form_has_a_configuration_that_triton_takes(bundles, tmp_path):
    result = export(bundles / "tagger", tmp_path / "models", "--form", "native")
    assert result["form"] == "native"


def test_what_cannot_be_served_is_a_mistake_of_usage(bundles, tmp_path):
    for options, message in (
        (["--max-batch", "64"], "max_batch is more than onnxruntime-cpu-fp32 takes"),
        (["-e", "nothing"], "unknown engine 'nothing'"),
        (["--name", "a b"], "the model cannot have this name"),
    ):
        ran = CliRunner().invoke(
            cli, ["export-triton", str(bundles / "tagger"), str(tmp_path / "models"), *options], standalone_mode=False
        )
        assert ran.return_value == 2
        assert message in ran.output
    assert not (tmp_path / "models").exists()
