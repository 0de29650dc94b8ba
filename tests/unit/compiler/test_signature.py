from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from enginesmith.compiler.signature import AxisRange, Signature, TensorSpec, check_input_dtype, parse_inputs
from enginesmith.errors import DataError, RecipeError

IMAGE = parse_inputs(["image:1x3x8x8"], ["image:0=1..8..64"])
IDS = parse_inputs(["ids:1x128:int64", "mask:1x128:int64"], ["ids:0=1..8", "mask:0=1..8", "ids:1=2..16..128"])


def zeros(signature: Signature, **sizes: int) -> dict[str, np.ndarray]:
    shapes = signature.shapes(sizes)
    return {spec.name: np.zeros(shapes[spec.name], spec.dtype) for spec in signature.inputs}


# --- text ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("image:1x3x224x224", TensorSpec("image", "float32", (1, 3, 224, 224))),
        ("image:[1,3,224,224]", TensorSpec("image", "float32", (1, 3, 224, 224))),
        ("image:[1, 3, 224, 224]", TensorSpec("image", "float32", (1, 3, 224, 224))),
        ("image:1,3,224,224", TensorSpec("image", "float32", (1, 3, 224, 224))),
        ("image:1X3", TensorSpec("image", "float32", (1, 3))),
        ("ids:1x128:int64", TensorSpec("ids", "int64", (1, 128))),
        ("ids:1x128:LONG", TensorSpec("ids", "int64", (1, 128))),
        ("x:4:half", TensorSpec("x", "float16", (4,))),
        ("scope/x:0:4:bool", TensorSpec("scope/x:0", "bool", (4,))),
        ("rate:scalar:int64", TensorSpec("rate", "int64", ())),
        ("rate:[]", TensorSpec("rate", "float32", ())),
        ("rate:", TensorSpec("rate", "float32", ())),
    ],
)
def test_inputs_are_read_in_every_known_spelling(text: str, expected: TensorSpec) -> None:
    assert parse_inputs([text]).inputs == (expected,)


@given(
    st.from_regex(r"[A-Za-z_][\w./]*", fullmatch=True, alphabet=st.characters(codec="ascii")),
    st.lists(st.integers(1, 4096)).map(tuple),
    st.sampled_from(["float32", "float16", "float64", "int64", "int32", "int8", "uint8", "bool"]),
)
def test_an_input_prints_as_it_is_read(name: str, shape: tuple[int, ...], dtype: str) -> None:
    spec = TensorSpec(name, dtype, shape)
    assert parse_inputs([str(spec)]).inputs == (spec,)


@pytest.mark.parametrize("text", ["image", "1x3x224x224", ":1x3", "image:1x3xC", "image:1x3:float33", "image:1x-3", ""])
def test_an_input_that_cannot_be_read_is_refused(text: str) -> None:
    message = rf"(?s)input {re.escape(repr(text))} cannot be read.*expected: name:1x3x224x224\[:dtype\]"
    with pytest.raises(RecipeError, match=message):
        parse_inputs([text])


def test_dynamic_axes_get_names_and_ranges() -> None:
    assert IMAGE.inputs[0].shape == ("batch", 3, 8, 8)
    assert IMAGE.axes == {"batch": AxisRange(1, 8, 64)}
    assert IDS.inputs[0].shape == ("batch", "dim1")
    assert IDS.inputs[1].shape == ("batch", 128)
    assert IDS.axes == {"batch": AxisRange(1, 8, 8), "dim1": AxisRange(2, 16, 128)}


def test_axes_of_other_ranges_are_other_axes() -> None:
    signature = parse_inputs(["a/b:1x4", "c:1x4"], ["c:0=1..2..4", "a/b:0=1..8..16"])
    assert [spec.shape[0] for spec in signature.inputs] == ["a_b_batch", "batch"]
    assert signature.axes == {"batch": AxisRange(1, 2, 4), "a_b_batch": AxisRange(1, 8, 16)}


def test_labels_tell_axes_apart_and_tie_them() -> None:
    signature = parse_inputs(["a:1x4", "b:4x1"], ["a:0=rows@1..2..4", "b:1=rows@1..2..4", "b:0=columns@1..2..4"])
    assert [spec.shape for spec in signature.inputs] == [("rows", 4), ("columns", "rows")]


def test_a_label_with_two_ranges_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"(?s)dynamic axis 'rows' has two ranges.*1\.\.2\.\.4.*1\.\.2\.\.8"):
        parse_inputs(["a:1x4", "b:1x4"], ["a:0=rows@1..2..4", "b:0=rows@1..2..8"])


@pytest.mark.parametrize("text", ["image", "image:0", "image:0=8", "image:0=1-8", "image:x=1..8", "image=1..8"])
def test_an_axis_that_cannot_be_read_is_refused(text: str) -> None:
    message = rf"(?s)dynamic axis '{text}' cannot be read.*expected: name:axis=min\.\.opt\.\.max"
    with pytest.raises(RecipeError, match=message):
        parse_inputs(["image:1x3x8x8"], [text])


@pytest.mark.parametrize("text", ["picture:0=1..8", "image:4=1..8"])
def test_an_axis_of_no_input_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"(?s)names no axis of an input.*expected: image:1x3x8x8:float32"):
        parse_inputs(["image:1x3x8x8"], [text])


@pytest.mark.parametrize("text", ["x:0", "x:0x8", "x:[1,0]"])
def test_an_empty_input_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=rf"(?s)input {re.escape(repr(text))} is empty.*sizes of at least 1"):
        parse_inputs([text])


def test_an_input_of_bfloat16_is_refused() -> None:
    message = r"(?s)input 'x' is of bfloat16, which arrays cannot hold.*wrap the model"
    with pytest.raises(RecipeError, match=message):
        parse_inputs(["x:1x4:bf16"])
    with pytest.raises(RecipeError, match=message):
        check_input_dtype(TensorSpec("x", "bfloat16", ("batch",)))


def test_an_input_is_given_once() -> None:
    with pytest.raises(RecipeError, match=r"(?s)input 'x' is given twice.*found: x:2x4:float32"):
        parse_inputs(["x:1x4", "y:1", "x:2x4"])


@pytest.mark.parametrize("second", ["x:0=1..2..4", "x:0=1..2..8", "x:0=rows@1..2..8"])
def test_an_axis_is_ranged_once(second: str) -> None:
    with pytest.raises(RecipeError, match="axis 0 of input 'x' has two ranges"):
        parse_inputs(["x:1x4", "y:1x4"], ["x:0=1..2..4", "y:0=1..2..4", second])


@pytest.mark.parametrize("bounds", ["0..1..2", "4..2..8", "1..8..4"])
def test_a_range_out_of_order_is_refused(bounds: str) -> None:
    with pytest.raises(RecipeError, match=r"(?s)out of order.*expected: 1 <= min <= opt <= max.*found: " + bounds):
        parse_inputs(["image:1x3x8x8"], [f"image:0={bounds}"])


# --- shapes and sizes ---


def test_a_range_holds_its_ends_and_nothing_else() -> None:
    bounds = AxisRange(2, 4, 8)
    assert [size for size in (1, 2, 8, 9, 2.0, "4") if size in bounds] == [2, 8]


def test_shapes_at_the_points_of_the_ranges() -> None:
    assert IDS.sizes("min") == {"batch": 1, "dim1": 2}
    assert IDS.shapes() == {"ids": (8, 16), "mask": (8, 128)}
    assert IDS.shapes({"batch": 3}) == {"ids": (3, 16), "mask": (3, 128)}


def test_the_batch_axis_is_the_dynamic_one_that_stands_first() -> None:
    assert IMAGE.batch_axis == "batch"
    assert parse_inputs(["x:1x4"], ["x:1=1..4"]).batch_axis is None
    assert parse_inputs(["x:scalar"]).batch_axis is None


def test_a_spec_is_described_with_its_ranges() -> None:
    assert IMAGE.describe(IMAGE.inputs[0]) == "(batch=1..8..64, 3, 8, 8)"
    assert IMAGE.describe(TensorSpec("y", "float32", ("?", 2))) == "(?, 2)"


def test_an_input_is_found_by_name() -> None:
    assert IDS.input("mask").dtype == "int64"


# --- checks of arrays ---


def test_arrays_that_fit_give_the_sizes_of_the_axes() -> None:
    assert IDS.check(zeros(IDS, batch=5, dim1=7)) == {"batch": 5, "dim1": 7}


def test_a_torch_dtype_counts_as_its_numpy_name() -> None:
    class Tensor:
        dtype = "torch.float32"
        shape = (2, 3, 8, 8)

    assert IMAGE.check({"image": Tensor()}) == {"batch": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("mask"), r"(?s)input 'mask' is missing.*expected: ids, mask.*found: ids"),
        (lambda a: a.clear(), r"(?s)input 'ids' is missing.*found: nothing"),
        (lambda a: a.update(label=a["ids"]), r"(?s)the model has no input 'label'.*expected: ids, mask"),
        (
            lambda a: a.update(ids=a["ids"].astype(np.int32)),
            r"(?s)input 'ids' has the wrong dtype.*expected: int64.*found: int32",
        ),
        (
            lambda a: a.update(ids=a["ids"][0]),
            r"(?s)input 'ids' has the wrong rank.*expected: \(batch=1\.\.8\.\.8, dim1=2\.\.16\.\.128\).*found: \(16,\)",
        ),
        (lambda a: a.update(ids=a["ids"][:, :1]), r"(?s)input 'ids' has the wrong shape.*found: \(8, 1\)"),
        (lambda a: a.update(mask=a["mask"][:, :64]), r"(?s)input 'mask' has the wrong shape.*128\).*found: \(8, 64\)"),
        (lambda a: a.update(mask=a["mask"][:4]), r"(?s)input 'mask' has the wrong shape.*found: \(4, 128\)"),
    ],
    ids=["missing", "nothing", "extra", "dtype", "rank", "range", "fixed", "two-sizes-of-one-axis"],
)
def test_arrays_that_do_not_fit_are_refused(change: Any, message: str) -> None:
    arrays = zeros(IDS)
    change(arrays)
    with pytest.raises(DataError, match=message):
        IDS.check(arrays)


# --- outputs and JSON ---


@pytest.mark.parametrize(
    ("structure", "expected"),
    [
        (None, 1),
        ("b", 2),
        ({"tuple": ["a", "b"]}, (1, 2)),
        ({"list": ["b", {"tuple": ["a"]}]}, [2, (1,)]),
        ({"tuple": [None, "b"]}, (None, 2)),
        ({"dict": {"logits": "a", "hidden": {"list": []}}}, {"logits": 1, "hidden": []}),
    ],
)
def test_outputs_nest_as_the_model_returns_them(structure: Any, expected: Any) -> None:
    nested = Signature(inputs=(), structure=structure).nest({"a": 1, "b": 2})
    assert nested == expected
    assert type(nested) is type(expected)


def test_json_holds_everything() -> None:
    signature = Signature(
        inputs=IDS.inputs,
        outputs=(TensorSpec("logits", "float32", ("batch", 10)), TensorSpec("n", "int64", ("?",))),
        axes=IDS.axes,
        structure={"dict": {"logits": "logits", "rest": {"tuple": ["n"]}}},
    )
    assert Signature.from_json(json.loads(json.dumps(signature.to_json()))) == signature
