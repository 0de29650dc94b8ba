from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from enginesmith.errors import DataError, RecipeError, UsageError
from enginesmith.serving.decoding import OPTIONS, decoder_config, request_of
from enginesmith.serving.prompt import Prompt
from enginesmith.serving.settings import Serving

small = runpy.run_path(str(Path(__file__).parents[2] / "small_decoder.py"))
IDS = {"ids": np.array([3, 1, 4])}


def test_the_configuration_is_one_of_tritons():
    text_format = pytest.importorskip("google.protobuf.text_format")
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    text = decoder_config("gpt", Serving(instances=2), engine="onnxruntime-cpu-fp32", kind="cpu")
    found = text_format.Parse(text, schema.ModelConfig())
    assert found.model_transaction_policy.decoupled
    assert [tensor.name for tensor in found.input] == ["ids", *OPTIONS]
    assert [tensor.optional for tensor in found.input] == [False, *[True] * len(OPTIONS)]
    assert found.instance_group[0].count == 2


@pytest.mark.parametrize(
    ("settings", "option"),
    [
        (Serving(merge=False), "no_merge"),
        (Serving(max_batch=4), "max_batch"),
        (Serving(max_queue=4), "max_queue"),
        (Serving(queue_delay_us=5), "queue_delay_us"),
    ],
)
def test_options_of_merging_are_refused(settings, option):
    with pytest.raises(UsageError, match=f"{option} is not for a language model with its cache"):
        decoder_config("gpt", settings, engine="e", kind="cpu")


def test_a_request_without_options_gets_the_likeliest_tokens():
    request = request_of(IDS, [7], print, print)
    assert request.prompt.tolist() == [3, 1, 4]
    assert (request.max_new_tokens, request.ends) == (128, {7})
    assert request.choice(np.array([0.0, 3.0, 1.0])) == 1


def test_a_request_says_what_it_wants():
    given = {"max_new_tokens": [5], "temperature": [0.5], "top_k": [1], "seed": [3], "stop": [1, 2]}
    arrays = {name: np.array(values, OPTIONS[name][0]) for name, values in given.items()}
    request = request_of({**IDS, **arrays}, [7], print, print)
    assert (request.max_new_tokens, request.ends) == (5, {1, 2})
    assert request.choice(np.array([0.0, 3.0, 1.0])) == 1


def test_requests_that_make_no_sense_are_refused():
    with pytest.raises(DataError, match="prompt 0 is empty"):
        request_of({"ids": np.zeros(0, np.int64)}, [], print, print)
    with pytest.raises(RecipeError, match="top_p is out of range"):
        request_of({**IDS, "top_p": np.array([2.0], np.float32)}, [], print, print)


class Client:
    """Answers a prompt with tokens, and an end."""

    def __init__(self, *tokens):
        self._tokens = tokens

    def start_stream(self, callback, stream_timeout):
        self._callback = callback

    def async_stream_infer(self, model, inputs, request_id, enable_empty_final_response):
        for token in self._tokens:
            self._answer([token], last=False)
        self._answer([], last=True)

    def stop_stream(self, cancel_requests):
        self.cancelled = cancel_requests

    def _answer(self, tokens, *, last):
        from tritonclient.grpc import service_pb2

        message = service_pb2.ModelInferResponse()
        message.parameters["triton_final_response"].bool_param = last
        for token in tokens:
            message.outputs.add(name="token", datatype="INT64", shape=[1])
            message.raw_output_contents.append(np.int64(token).tobytes())
        self._callback(SimpleNamespace(get_response=lambda: message), None)


@pytest.mark.parametrize("drafted", [0, 3])
def test_a_probe_tells_right_tokens_from_wrong_ones(tmp_path, drafted):
    pytest.importorskip("tritonclient.grpc")
    bundle = small["write_bundle"](tmp_path / "gpt", drafted=drafted)
    probe = Prompt(bundle, small["signature"](drafted), 1e-3)
    (right,) = small["greedy"]([3, 1, 4], 1)
    client = Client(right)
    assert probe(client, "gpt", "1", 5.0) == ""
    assert not client.cancelled
    wrong = (right + 1) % small["VOCABULARY"]
    assert probe(Client(wrong), "gpt", "1", 5.0) == f"token {wrong} came, where [{right}] was expected"
    assert probe(Client(), "gpt", "1", 5.0) == "0 tokens came, where one was asked for"


def test_a_probe_without_a_recorded_prompt_wants_a_token(tmp_path):
    pytest.importorskip("tritonclient.grpc")
    probe = Prompt(tmp_path, small["signature"](), 1e-3)
    assert probe(Client(5), "gpt", "1", 5.0) == ""


def test_a_probe_that_gets_no_answer_is_late(tmp_path, monkeypatch):
    utils = pytest.importorskip("tritonclient.utils")
    probe = Prompt(tmp_path, small["signature"](), 1e-3)
    monkeypatch.setattr(Client, "async_stream_infer", lambda *_, **__: None)
    client = Client()
    with pytest.raises(utils.InferenceServerException, match="no answer in time"):
        probe(client, "gpt", "1", 0.01)
    assert client.cancelled
