import io
import pickle
import zipfile

import numpy as np
import pytest
import torch

from enginesmith.compiler.sources.detect import detect
from enginesmith.errors import SourceError


def zipped(*names):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            archive.writestr(zipfile.ZipInfo(name), b"content")  # of a fixed date: tests are named by their bytes
    return stream.getvalue()


def safetensors():
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    return len(header).to_bytes(8, "little") + header + bytes(4)


def numpy_array():
    stream = io.BytesIO()
    np.save(stream, np.zeros(3))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("m.pt", zipped("m/data.pkl", "m/constants.pkl", "m/code/__torch__.py"), "torchscript"),
        ("m.onnx", zipped("m/data.pkl", "m/constants.pkl", "m/code/__torch__.py"), "torchscript"),
        ("m.pt", zipped("m/data.pkl", "m/data/0"), "weights"),
        ("m.pt2", zipped("m/archive_format", "m/models/model.json"), "exported-program"),
        ("m.pt2", zipped("serialized_exported_program.json", "version"), "exported-program"),
        ("m.pth", pickle.dumps({}), "weights"),
        ("m.safetensors", safetensors(), "weights"),
        ("m.onnx", b"\x08\x0a\x12\x00", "onnx"),
        ("m.bin", b"\x08\x0a\x12\x00", "onnx"),
    ],
)
def test_the_content_decides(tmp_path, name, content, kind):
    (tmp_path / name).write_bytes(content)
    assert detect(tmp_path / name) == kind


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("m.onnx", b"", "an empty file"),
        ("m.txt", b"Hello, \xc3\xa4 world", "a text file"),
        ("m.txt", b"x" * 1023 + "ä".encode(), "a text file"),
        ("m.onn", b"\xff\xfe\x00\x01garbage", "of an unknown kind"),
        ("m.pt", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer; run `git lfs pull`"),
        ("m.gguf", b"GGUF\x03\x00\x00\x00", "a GGUF file"),
        ("m.h5", b"\x89HDF\r\n", "an HDF5 file"),
        ("m.tflite", b"\x1c\x00\x00\x00TFL3", "a TensorFlow Lite model"),
        ("m.ort", b"\x1c\x00\x00\x00ORTM", "in ONNX Runtime's own format"),
        ("m.plan", b"ftrt\x00", "a TensorRT engine"),
        ("m.so", b"\x7fELF", "a program or shared library"),
        ("m.gz", b"\x1f\x8b\x08", "a gzip archive"),
        ("m.npy", numpy_array(), "a NumPy array"),
        ("m.npz", zipped("x.npy"), r"NumPy arrays \(.npz\)"),
        ("m.zip", zipped("readme.md"), "a zip archive of readme.md"),
        ("m.pt2", zipped("m/archive_format", "m/data/aotinductor/model/x.so"), "an AOTInductor package"),
        ("m.pt", zipped("m/data.pkl")[:40], "truncated or damaged archive"),
    ],
)
def test_what_is_no_model_is_named(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=f"(?s)m\\..*{match}") as error:
        detect(tmp_path / name)
    assert "TorchScript archive" in error.value.expected


def test_a_folder_is_no_model(tmp_path):
    with pytest.raises(SourceError, match=r"(?s)a folder without config.json.*save_pretrained"):
        detect(tmp_path)


def test_a_missing_file_is_answered_with_the_nearest(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"\x08")
    with pytest.raises(SourceError, match=r"(?s)does not exist.*did you mean .*model.onnx"):
        detect(tmp_path / "modle.onnx")
    with pytest.raises(SourceError, match=r"(?s)does not exist.*check the path"):
        detect(tmp_path / "nowhere" / "x")


def test_what_torch_writes_is_told_apart(tmp_path):
    module = torch.nn.Linear(2, 3).eval()
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    torch.save(module.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.jit.save(torch.jit.script(module), tmp_path / "script.pt")
    assert detect(tmp_path / "weights.pt") == detect(tmp_path / "old.pt") == "weights"
    assert detect(tmp_path / "script.pt") == "torchscript"
