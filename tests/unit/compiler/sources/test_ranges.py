import pytest

from enginesmith.compiler.signature import AxisRange, TensorSpec, parse_inputs
from enginesmith.compiler.sources.ranges import FileInput, with_ranges
from enginesmith.errors import RecipeError, UnknownNameError

IMAGE = FileInput(TensorSpec("image", "float32", ()), ("N", 3, None))
STATE = FileInput(TensorSpec("state", "float32", ()), (2, "N"))


def test_a_range_is_given_once_for_all_that_share_the_axis():
    user = parse_inputs(["image:1x3x8", "state:2x1"], ["image:0=1..4..8"])
    signature = with_ranges([IMAGE, STATE], user, "m.onnx")
    assert [spec.shape for spec in signature.inputs] == [("N", 3, 8), (2, "N")]
    assert signature.axes == {"N": AxisRange(1, 4, 8)}


def test_axes_without_a_name_take_the_users():
    user = parse_inputs(["image:1x3x8"], ["image:0=1..4..8", "image:2=width@8..16"])
    assert with_ranges([IMAGE], user, "m.onnx").inputs[0].shape == ("N", 3, "width")
    assert with_ranges([IMAGE], user, "m.pt2", keep_names=False).inputs[0].shape == ("batch", 3, "width")


def test_an_axis_may_be_fixed():
    signature = with_ranges([IMAGE, STATE], parse_inputs(["image:5x3x8"]), "m.onnx")
    assert [spec.shape for spec in signature.inputs] == [(5, 3, 8), (2, 5)]
    assert not signature.axes


def test_static_inputs_need_nothing_from_the_user():
    fixed = FileInput(TensorSpec("x", "int64", ()), (1, 3))
    assert with_ranges([fixed], None, "m.onnx").inputs == (TensorSpec("x", "int64", (1, 3)),)


@pytest.mark.parametrize(
    ("inputs", "dynamic", "match"),
    [
        (
            [],
            [],
            r"axis 0 \(N\) of input 'image' is dynamic in m.onnx, and has no range(?s:.*)--dynamic image:0=1..8..64",
        ),
        (["image:1x3x8", "state:2x2"], [], "axis 'N' has two sizes(?s:.*)expected: 1(?s:.*)found: 2 for 'state'"),
        (["image:1x3x8", "state:2x1"], ["image:0=1..4..8", "state:1=1..2..4"], "axis 'N' has two ranges"),
        (["image:1x4x8"], [], r"input 'image' is declared otherwise in m.onnx(?s:.*)expected: Nx3x\?:float32"),
        (["image:1x3"], [], "declared otherwise"),
        (["image:1x3x8:float16"], [], "declared otherwise(?s:.*)found: 1x3x8:float16"),
        (["image:1x3x8"], ["image:1=1..2..3"], "cannot be made dynamic"),
    ],
)
def test_what_does_not_fit_is_refused(inputs, dynamic, match):
    with pytest.raises(RecipeError, match=match):
        with_ranges([IMAGE, STATE], parse_inputs(inputs, dynamic), "m.onnx")


def test_an_unknown_input_is_answered_with_the_nearest():
    with pytest.raises(UnknownNameError, match=r"unknown input of m.onnx 'imge'(?s:.*)did you mean 'image'"):
        with_ranges([IMAGE], parse_inputs(["imge:1"]), "m.onnx")


def test_ranges_alone_are_enough_for_a_file_that_knows_its_inputs():
    signature = with_ranges([IMAGE, STATE], None, "m.onnx", dynamic=["image:0=1..4..8", "image:2=width@8..16"])
    assert [spec.shape for spec in signature.inputs] == [("N", 3, "width"), (2, "N")]
    assert signature.axes == {"N": AxisRange(1, 4, 8), "width": AxisRange(8, 16, 16)}


@pytest.mark.parametrize(
    ("dynamic", "match"),
    [
        (
            ["image:0=1..4..8"],
            r"axis 2 \(without a name\) of input 'image'(?s:.*)--dynamic image:2=1..8..64 for a range",
        ),
        (["image:1=1..4..8"], "cannot be made dynamic"),
        (["imge:0=1..4..8"], "names no axis of an input"),
        (["image:0=1..4..8", "state:1=1..2..4"], "axis 'N' has two ranges"),
    ],
)
def test_ranges_alone_that_do_not_fit_are_refused(dynamic, match):
    with pytest.raises(RecipeError, match=match):
        with_ranges([IMAGE, STATE], None, "m.onnx", dynamic=dynamic)


def test_a_file_with_inputs_of_bfloat16_is_refused():
    with pytest.raises(RecipeError, match="input 'x' is of bfloat16"):
        with_ranges([FileInput(TensorSpec("x", "bfloat16", ()), (1, 3))], None, "m.onnx")
