import json

import onnx
import onnx.parser
import pytest
import torch
import transformers

from enginesmith.compiler.sources import describe_source
from enginesmith.errors import SourceError

pytestmark = pytest.mark.filterwarnings("ignore")
BYTES = 4 * (6 + 3)


def linear():
    return torch.nn.Linear(2, 3).eval()


def described(source):
    found = describe_source(str(source))
    return json.loads(json.dumps(found))


def test_a_factory(tmp_path):
    (tmp_path / "m.py").write_text("import torch\ndef build():\n    return torch.nn.Sequential(torch.nn.Linear(2, 3))")
    found = described(f"{tmp_path}/m.py:build")
    assert (found["kind"], found["class"], found["weight_bytes"]) == ("module", "Sequential", BYTES)
    assert found["inputs"] == [{"name": "input", "needed": "yes"}]
    assert found["modules"] == {"Linear": 1}
    assert found["precisions"] == {"float32": 2}


def test_torchscript(tmp_path):
    torch.jit.save(torch.jit.script(linear()), tmp_path / "m.pt")
    found = described(tmp_path / "m.pt")
    assert (found["kind"], found["weight_bytes"]) == ("TorchScript", BYTES)
    assert found["operators"] == {"aten::linear": 1}
    assert found["size_bytes"] == (tmp_path / "m.pt").stat().st_size


def test_an_exported_program(tmp_path):
    shapes = ({0: torch.export.Dim("n", min=1, max=8)},)
    torch.export.save(torch.export.export(linear(), (torch.ones(4, 2),), dynamic_shapes=shapes), tmp_path / "m.pt2")
    found = described(tmp_path / "m.pt2")
    (symbol,) = found["axes"]
    assert found["axes"] == {symbol: "1..8"}
    assert found["inputs"] == [{"name": "input", "shape": f"{symbol}x2", "dtype": "float32"}]
    assert found["operators"] == {"aten.linear.default": 1}
    assert found["weight_bytes"] == BYTES


def test_weights(tmp_path):
    torch.save(linear().state_dict(), tmp_path / "w.pt")
    found = described(tmp_path / "w.pt")
    assert found["tensors"][0] == {"name": "weight", "shape": "3x2", "dtype": "float32"}
    assert (found["kind"], found["weight_bytes"]) == ("weights", BYTES)


def test_onnx(tmp_path):
    text = '<ir_version: 8, opset_import: ["" : 17]>main (float[2] x) => (float[2] y) { y = Relu(x) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.bin")
    assert described(tmp_path / "m.bin")["operators"] == {"Relu": 1}


def test_anything_else(tmp_path):
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(SourceError, match="a text file"):
        describe_source(str(tmp_path / "notes.txt"))


def test_a_folder_of_transformers(tmp_path):
    config = transformers.GPT2Config(vocab_size=7, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    found = describe_source(str(tmp_path))
    assert (found["kind"], found["class"]) == ("folder of transformers", "GPT2LMHeadModel")
    assert found["modules"]["LayerNorm"] == 3
    assert set(found["precisions"]) == {"float32"}
