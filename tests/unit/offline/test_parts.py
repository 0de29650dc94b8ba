"""Rows of files are read where they lie, whatever way the file holds them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from enginesmith.compiler.signature import AxisRange, Signature, TensorSpec
from enginesmith.errors import DataError
from enginesmith.offline.layout import layout_of
from enginesmith.offline.lines import STRIDE, LinesPart
from enginesmith.offline.parts import MemoryPart
from enginesmith.offline.source import open_file, open_source, part_of

X = np.arange(5000 * 6, dtype=np.float32).reshape(5000, 2, 3)
SIGNATURE = Signature((TensorSpec("x", "float32", ("batch", 2, 3)),), axes={"batch": AxisRange(1, 4, 8)})
LAYOUT = layout_of(SIGNATURE)
CUTS = [(0, 3), (3, 10), (4990, 5000), (7, 8), (1023, 1026), (2048, 2049)]


def write_lines(path, arrays=X):
    path.write_text("".join(json.dumps({"x": row.tolist()}) + "\n" for row in arrays))


WRITERS = {
    "c.npy": lambda path: np.save(path, X),
    "fortran.npy": lambda path: np.save(path, np.asfortranarray(X)),
    "stored.npz": lambda path: np.savez(path, y=X[:2], x=X),
    "packed.npz": lambda path: np.savez_compressed(path, y=X[:2], x=X),
    "fortran.npz": lambda path: np.savez(path, x=np.asfortranarray(X)),
    "packed-fortran.npz": lambda path: np.savez_compressed(path, x=np.asfortranarray(X)),
    "x.jsonl": write_lines,
}


@pytest.mark.parametrize("name", WRITERS)
def test_rows_are_read_from_anywhere_and_in_another_process(name, tmp_path):
    WRITERS[name](tmp_path / name)
    part = open_file(tmp_path / name, LAYOUT)
    assert part.specs["x"] == (np.float32, X.shape)
    for start, stop in CUTS:
        np.testing.assert_array_equal(part.read(start, stop, ("x",), ()).arrays["x"], X[start:stop])
        place = json.loads(json.dumps(part.place(start)))
        other = part_of(**place)
        np.testing.assert_array_equal(other.read(start, stop, ("x",), ()).arrays["x"], X[start:stop])
        other.close()
    part.close()
    np.testing.assert_array_equal(part.read(1, 2, ("x",), ()).arrays["x"], X[1:2])


def test_a_shared_array_is_read_whole(tmp_path):
    scale = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    np.savez(tmp_path / "a.npz", x=X, scale=scale, one=np.float32(2))
    read = part_of(str(tmp_path / "a.npz")).read(1, 2, ("x",), ("scale", "one")).arrays
    np.testing.assert_array_equal(read["scale"], scale)
    assert read["one"] == 2


@pytest.mark.parametrize("name", ["c.npy", "stored.npz", "packed.npz"])
def test_a_file_that_ends_early_is_named(name, tmp_path):
    path = tmp_path / name
    WRITERS[name](path)
    content = path.read_bytes()
    part = open_file(path, LAYOUT)
    path.write_bytes(content[: len(content) // 4])
    with pytest.raises(DataError, match=rf"{name} cannot be read"):
        part.read(4000, 4010, ("x",), ())


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x93NUMPY\x01\x00"])
@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_files_that_are_no_arrays_are_named(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} cannot be read"):
        open_file(tmp_path / name, LAYOUT)


def test_python_objects_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.array([{}, 1], dtype=object))
    with pytest.raises(DataError, match=r"x\.npy holds Python objects"):
        open_file(tmp_path / "x.npy", LAYOUT)


def test_lines_remember_few_places(tmp_path):
    write_lines(tmp_path / "x.jsonl")
    part = open_file(tmp_path / "x.jsonl", LAYOUT)
    assert isinstance(part, LinesPart)
    assert len(part._offsets) == -(-len(X) // STRIDE)


def test_a_jsonl_that_lost_lines_is_named(tmp_path):
    write_lines(tmp_path / "x.jsonl")
    part = open_file(tmp_path / "x.jsonl", LAYOUT)
    write_lines(tmp_path / "x.jsonl", X[:10])
    with pytest.raises(DataError, match=r"x\.jsonl has become shorter"):
        part.read(5, 15, ("x",), ())


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("[1]", "a list and no object"),
        ("{", "no JSON: "),
        ('{"y": 1}', "'x' is missing"),
        ('{"x": 1.5}', "'x' is not of int8"),
        ('{"x": 300}', "'x' holds a number that int8 cannot hold"),
        ('{"x": [1]}', "'x' has the shape (1,) and not ()"),
        ('{"x": [[1], [1, 2]]}', "'x' holds lists of different lengths"),
        ('{"x": null}', "'x' is not of int8"),
    ],
)
def test_what_is_wrong_with_a_line(line, reason, tmp_path):
    (tmp_path / "x.jsonl").write_text(f'{{"x": 3}}\n\n{line}\n')
    found = LinesPart(tmp_path / "x.jsonl", {"x": ("int8", [])}).read(0, 2, ("x",), ())
    assert list(found.problems) == [1]
    assert found.problems[1].startswith(reason)
    assert found.arrays["x"].tolist() == [3, 0]


def test_what_is_kept_of_lines_may_be_text_and_is_kept_of_bad_rows_too(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"x": 3, "id": "a"}\n{"x": "no", "id": "b"}\n')
    part = LinesPart(tmp_path / "x.jsonl", {"x": ("int8", []), "id": (None, None)})
    assert part.read(0, 2, ("x", "id"), ()).arrays["id"].tolist() == ["a", "b"]


def test_the_first_line_decides_the_sizes_of_dynamic_axes(tmp_path):
    signature = Signature(
        (TensorSpec("ids", "int64", ("batch", "length")),),
        axes={"batch": AxisRange(1, 4, 8), "length": AxisRange(1, 16, 64)},
    )
    (tmp_path / "x.jsonl").write_text('{"ids": [1, 2]}\n{"ids": [3, 4]}\n{"ids": [5]}\n')
    part = open_file(tmp_path / "x.jsonl", layout_of(signature))
    assert part.specs["ids"].shape == (3, 2)
    assert part.read(0, 3, ("ids",), ()).problems == {2: "'ids' has the shape (1,) and not (2,)"}


def test_arrays_in_memory():
    part = MemoryPart("m", {"x": X, "scale": X[0]})
    read = part.read(3, 5, ("x",), ("scale",))
    assert read.arrays["x"].base is not None
    assert read.arrays["scale"].shape == (2, 3)


@pytest.mark.parametrize(
    ("make", "text", "message"),
    [
        (lambda f: None, "none", r"data '.*none' does not exist"),
        (lambda f: (f / "x.csv").write_text(""), "x.csv", r"x\.csv' is of an unknown kind"),
        (lambda f: (f / "e").mkdir(), "e", r"e' holds no data"),
        (lambda f: (f / "x.csv").write_text(""), "*", r"takes in .*x\.csv, of an unknown kind"),
        (lambda f: None, "*.npy", r"\*\.npy' holds no data"),
    ],
)
def test_sources_that_are_none(make, text, message, tmp_path):
    make(tmp_path)
    with pytest.raises(DataError, match=message):
        open_source(str(tmp_path / text), LAYOUT)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def f(): return 3", "gives nothing that can be iterated"),
        ("def f(): yield 3", "batch 0 is no dict of arrays"),
        ("def f():\n  yield {}\n  raise OSError('gone')", "the data function failed at .*gone|failed at"),
        ("def f(): yield {'x': [[1], [1, 2]]}", "'x' is no array"),
        ("def f(): yield {'x': [None]}", "'x' holds Python objects"),
    ],
)
def test_functions_that_give_something_else(code, message, tmp_path):
    (tmp_path / "data.py").write_text(code)
    with pytest.raises(DataError, match=message):
        list(open_source(f"{tmp_path / 'data.py'}:f", LAYOUT).parts())


def test_data_is_known_by_its_content_and_its_order(tmp_path):
    for name, array in {"a.npy": X[:2], "b.npy": X[2:4]}.items():
        np.save(tmp_path / name, array)
    first = open_source(str(tmp_path), LAYOUT).identity
    np.save(tmp_path / "a.npy", X[:2])  # written again: another time, the same content
    assert open_source(str(tmp_path), LAYOUT).identity == first
    assert open_source(str(tmp_path / "*.npy"), LAYOUT).identity == first
    np.save(tmp_path / "a.npy", X[4:6])
    assert open_source(str(tmp_path), LAYOUT).identity != first


def test_much_data_is_known_by_sizes_and_times(tmp_path, monkeypatch):
    monkeypatch.setattr("enginesmith.offline.source.HASHED_BYTES", 100)
    np.save(tmp_path / "a.npy", X)
    first = open_source(str(tmp_path), LAYOUT).identity
    assert "sizes_and_times_sha256" in first
    assert open_source(str(tmp_path), LAYOUT).identity == first
    np.save(tmp_path / "a.npy", X[:-1])
    assert open_source(str(tmp_path), LAYOUT).identity != first
