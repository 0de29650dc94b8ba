import dataclasses
import json
import runpy
from pathlib import Path

from enginesmith.compiler.signature import Signature
from enginesmith.compiler.sources import Model
from enginesmith.compiler.text import keep_text

small = runpy.run_path(str(Path(__file__).parents[2] / "small_decoder.py"))


def model(**changes):
    made = Model(
        kind="module", reference=None, signature=small["signature"](), module=None, onnx_path=None, fingerprint="",
        parameter_bytes=0,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def test_a_bundle_keeps_tokenizer_and_ends(tmp_path):
    (tmp_path / "source.json").write_text('{"version": "1.0"}')
    (tmp_path / "bundle").mkdir()
    keep_text(model(tokenizer=tmp_path / "source.json", stop=(2, 5)), tmp_path / "bundle")
    assert json.loads((tmp_path / "bundle/text/generation.json").read_text()) == {"stop": [2, 5]}
    assert (tmp_path / "bundle/text/tokenizer.json").read_text() == '{"version": "1.0"}'


def test_a_model_without_a_tokenizer_keeps_its_ends_alone(tmp_path):
    keep_text(model(), tmp_path)
    assert [path.name for path in (tmp_path / "text").iterdir()] == ["generation.json"]


def test_other_models_keep_nothing(tmp_path):
    keep_text(model(signature=Signature(inputs=())), tmp_path)
    assert list(tmp_path.iterdir()) == []
