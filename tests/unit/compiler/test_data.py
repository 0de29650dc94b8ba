import json

import numpy as np
import pytest

from enginesmith.compiler.data import RANDOM_BATCHES, digest, open_data
from enginesmith.compiler.signature import parse_inputs
from enginesmith.errors import DataError, UsageError

STATIC = parse_inputs(["image:1x1x4x4"])
DYNAMIC = parse_inputs(["image:1x1x4x4"], ["image:0=2..8..64"])
PAIR = parse_inputs(["ids:1x4:int64", "mask:1x4:int64"], ["ids:0=1..2..8", "mask:0=1..2..8"])


def images(rows: int) -> np.ndarray:
    return np.arange(rows * 16, dtype=np.float32).reshape(rows, 1, 4, 4)


def test_npz_is_cut_into_batches_of_the_optimum_and_labels_travel_along(tmp_path):
    np.savez_compressed(tmp_path / "data.npz", image=images(20), label=np.arange(20))
    data = open_data(str(tmp_path / "data.npz"), DYNAMIC)
    assert [batch["image"].shape[0] for batch in data] == [8, 8, 4]
    assert all("label" not in batch for batch in data)
    assert np.array_equal(np.concatenate([batch["label"] for batch in data.labelled()]), np.arange(20))
    assert np.array_equal(np.concatenate([batch["image"] for batch in data]), images(20))


def test_a_rest_smaller_than_the_minimum_is_left_out(tmp_path):
    np.savez(tmp_path / "data.npz", image=images(17))
    assert [batch["image"].shape[0] for batch in open_data(str(tmp_path / "data.npz"), DYNAMIC)] == [8, 8]


def test_fortran_order_gives_the_same_rows(tmp_path):
    np.savez(tmp_path / "data.npz", image=np.asfortranarray(images(20)))
    batches = list(open_data(str(tmp_path / "data.npz"), DYNAMIC))
    assert np.array_equal(np.concatenate([batch["image"] for batch in batches]), images(20))


def test_npy_serves_a_model_of_one_input(tmp_path):
    np.save(tmp_path / "data.npy", images(3))
    assert [batch["image"].shape for batch in open_data(str(tmp_path / "data.npy"), STATIC)] == [(1, 1, 4, 4)] * 3


def test_npy_for_two_inputs_is_refused(tmp_path):
    np.save(tmp_path / "data.npy", images(3))
    with pytest.raises(DataError, match=r"holds one array, the model has several inputs"):
        open_data(str(tmp_path / "data.npy"), PAIR)


def test_folder_gives_its_files_in_order(tmp_path):
    for number in (2, 1):
        np.savez(tmp_path / f"{number}.npz", image=np.full((1, 1, 4, 4), number, np.float32))
    assert [batch["image"].max() for batch in open_data(str(tmp_path), STATIC)] == [1, 2]


def test_function_yields_batches_each_time_it_is_iterated(tmp_path):
    code = (
        "import numpy\ndef batches():\n    for i in range(3): yield {'image': numpy.zeros((1, 1, 4, 4), 'float32')}\n"
    )
    (tmp_path / "data.py").write_text(code)
    data = open_data(f"{tmp_path}/data.py:batches", STATIC)
    assert len(list(data)) == len(list(data)) == 3


def test_function_that_yields_something_else_is_refused(tmp_path):
    (tmp_path / "data.py").write_text("def batches():\n    yield [1]\n")
    with pytest.raises(DataError, match=r"yields something else than inputs\n.*dicts of arrays.*\n.*list"):
        open_data(f"{tmp_path}/data.py:batches", STATIC)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("batches = None", r"data function '.*data.py:batches' is no function\n(.|\n)*of type NoneType"),
        ("def batches(): pass", r"gives nothing that can be iterated\n(.|\n)*found: NoneType"),
        ("def batches(count): pass", r"data function batches\(count\) does not take the arguments(.|\n)*'count'"),
        ("def batches():\n    raise KeyError('x')\n    yield", r"failed at .*data.py:2 in batches\n.*KeyError: 'x'"),
        ("def batch(): pass", r"unknown data function in data.py 'batches'(.|\n)*did you mean 'batch'"),
        ("def batches():\n    yield {'image': [[1], [1, 2]]}", r"batches, 'image' is no array\n"),
        ("def batches():\n    yield {'label': [object()]}", r"batches, 'label' holds Python objects\n"),
    ],
)
def test_functions_that_give_no_data_are_refused(tmp_path, code, message):
    (tmp_path / "data.py").write_text(code)
    with pytest.raises(UsageError, match=message):
        open_data(f"{tmp_path}/data.py:batches", STATIC)


def test_an_absent_file_of_a_function_is_refused():
    with pytest.raises(DataError, match=r"the file of data function 'absent\.py:batches' does not exist"):
        open_data("absent.py:batches", STATIC)


def test_polygraphy_inputs_are_read(tmp_path):
    from polygraphy.json import save_json

    save_json([{"image": images(1)}], str(tmp_path / "inputs.json"))
    assert np.array_equal(next(iter(open_data(str(tmp_path / "inputs.json"), STATIC)))["image"], images(1))


def test_other_json_is_refused(tmp_path):
    (tmp_path / "inputs.json").write_text(json.dumps({"image": 1}))
    with pytest.raises(DataError, match="is not a Polygraphy input file"):
        open_data(str(tmp_path / "inputs.json"), STATIC)


def test_random_inputs_say_so_and_repeat():
    data = open_data(None, PAIR, seed=3)
    first, second = list(data), list(data)
    assert data.random
    assert len(first) == RANDOM_BATCHES
    assert all(np.array_equal(a["ids"], b["ids"]) for a, b in zip(first, second, strict=True))
    assert first[0]["ids"].shape == (2, 4)
    assert set(np.unique(first[0]["ids"])) <= {0, 1}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"picture": images(2)}, r"input 'image' is missing\n.*image\n.*picture"),
        ({"image": images(2).astype(np.float64)}, r"wrong dtype\n.*float32\n.*float64"),
        (
            {"image": np.zeros((2, 1, 5, 4), np.float32)},
            r"wrong shape\n.*\(batch=2..8..64, 1, 4, 4\)\n.*\(2, 1, 5, 4\)",
        ),
        ({"image": np.zeros((2, 16), np.float32)}, r"wrong rank"),
        ({"image": images(1)}, r"holds fewer rows than one batch\n.*2\n.*1"),
        ({"image": images(2) * np.nan}, r"data.npz, batch 1: input 'image' holds NaN or Inf"),
        ({"image": np.array([object()])}, r"holds Python objects"),
        ({"image": images(0)}, r"holds fewer rows than one batch"),
    ],
)
def test_what_does_not_fit_is_refused_at_once(tmp_path, arrays, message):
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(DataError, match=message):
        open_data(str(tmp_path / "data.npz"), DYNAMIC)


def test_a_bad_batch_later_on_is_named(tmp_path):
    bad = images(16)
    bad[9] = np.inf
    np.savez(tmp_path / "data.npz", image=bad)
    data = open_data(str(tmp_path / "data.npz"), DYNAMIC)
    with pytest.raises(DataError, match=r"data.npz, batch 2: input 'image' holds NaN or Inf"):
        list(data)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.npz", None, "does not exist"),
        ("data.csv", b"1,2", r"unknown kind\n.*\n.*\.csv"),
        ("data.npz", b"not a zip", "is not a readable .npz file"),
        ("data.npy", b"not an array", "is not a readable .npy file"),
    ],
)
def test_unreadable_sources_are_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_data(str(tmp_path / name), STATIC)


def test_truncated_npz_is_refused(tmp_path):
    np.savez(tmp_path / "whole.npz", image=images(64))
    (tmp_path / "data.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:2000])
    with pytest.raises(DataError, match="is not a readable"):
        open_data(str(tmp_path / "data.npz"), DYNAMIC)


def test_empty_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no samples"):
        open_data(str(tmp_path), STATIC)


def test_digest_follows_the_content(tmp_path):
    np.savez(tmp_path / "data.npz", image=images(2))
    before = digest(str(tmp_path / "data.npz"))
    assert before == digest(str(tmp_path / "data.npz"))
    np.savez(tmp_path / "data.npz", image=images(3))
    assert digest(str(tmp_path / "data.npz")) != before
