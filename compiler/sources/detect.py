"""What a file is, told by its content first and its suffix second. Nothing in it is run."""

from __future__ import annotations

import difflib
import zipfile
from pathlib import Path
from typing import Literal

from ...errors import SourceError

Kind = Literal["torchscript", "exported-program", "onnx", "weights"]

ACCEPTED = (
    "file.py:factory with --weights, a TorchScript archive (.pt, .jit), an exported program (.pt2), ONNX (.onnx), or a "
    "folder of transformers"
)

MAGIC = (
    (0, b"version https://git-lfs", "a Git LFS pointer; run `git lfs pull` to fetch the file itself"),
    (0, b"GGUF", "a GGUF file of llama.cpp"),
    (0, b"\x89HDF", "an HDF5 file, as Keras writes them"),
    (4, b"TFL3", "a TensorFlow Lite model"),
    (4, b"ORTM", "a model in ONNX Runtime's own format; give the .onnx file that it was made from"),
    (0, b"ftrt", "a TensorRT engine, which is compiled already"),
    (0, b"ptrt", "a TensorRT engine, which is compiled already"),
    (0, b"\x7fELF", "a program or shared library"),
    (0, b"\x1f\x8b", "a gzip archive; unpack it first"),
    (0, b"\x93NUMPY", "a NumPy array; give it as --data"),
)


def detect(path: Path) -> Kind:
    """The kind of a model file; "weights" is a state_dict without the model.

    Raises:
        SourceError: there is no such file, or it is no model, with what it is instead.
    """
    if not path.exists():
        near = difflib.get_close_matches(path.name, _neighbours(path), n=1)
        raise SourceError(
            f"model {str(path)!r} does not exist",
            expected=ACCEPTED,
            hint=f"did you mean {str(path.with_name(near[0]))!r}?" if near else "check the path",
        )
    if path.is_dir():
        raise _refused(
            path,
            "a folder without config.json",
            "give a folder as transformers' save_pretrained writes it, or a factory",
        )
    with path.open("rb") as stream:
        head = stream.read(1024)
    if not head:
        raise _refused(path, "an empty file", "copy or export it again")
    if head.startswith(b"PK\x03\x04"):
        return _detect_zip(path)
    for offset, magic, words in MAGIC:
        if head[offset:].startswith(magic):
            raise _refused(path, words)
    if head[0] == 0x80 and 2 <= head[1] <= 5:
        return "weights"  # a pickle: the format of torch.save before version 1.6
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return "weights"  # safetensors
    if path.suffix == ".onnx" or head[0] == 0x08:  # field 1 of a protobuf, ONNX's ir_version
        return "onnx"
    raise _refused(path, "a text file" if _is_text(head) else f"of an unknown kind (it starts with {head[:8]!r})")


def _detect_zip(path: Path) -> Kind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise SourceError(
            f"model {str(path)!r} is a truncated or damaged archive",
            expected=ACCEPTED,
            found=f"{error}, {path.stat().st_size} bytes",
            hint="copy or save it again",
        ) from error
    inside = {name.partition("/")[2] for name in names}
    if any(name.startswith("data/aotinductor/") for name in inside):
        raise _refused(
            path, "an AOTInductor package, which is compiled already", "give the program saved by torch.export.save"
        )
    if "serialized_exported_program.json" in names:
        return "exported-program"  # as torch.export.save wrote it up to torch 2.7
    if "archive_format" in inside and any(name.startswith("models/") for name in inside):
        return "exported-program"
    if "constants.pkl" in inside and any(name.startswith("code/") for name in inside):
        return "torchscript"
    if "data.pkl" in inside:
        return "weights"
    if all(name.endswith(".npy") for name in names):
        raise _refused(path, "NumPy arrays (.npz); give them as --data")
    raise _refused(path, f"a zip archive of {', '.join(names[:3])}", "unpack it first")


def _refused(path: Path, words: str, hint: str | None = None) -> SourceError:
    return SourceError(f"model {str(path)!r} is no model", expected=ACCEPTED, found=words, hint=hint)


def _neighbours(path: Path) -> list[str]:
    return [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        text = head[: error.start].decode() if error.start >= len(head) - 3 else "\0"
    return "\0" not in text
