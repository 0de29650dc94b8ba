import pytest

from enginesmith.targets.trt.precisions import LOWERINGS, PRECISIONS, refusals


def test_each_precision_has_a_lowering():
    assert set(LOWERINGS) == set(PRECISIONS)


@pytest.mark.parametrize(
    ("major", "capabilities", "refused"),
    [
        (8, ["9.0"], {"bf16", "mixed-bf16", "fp8", "int4-weights"}),
        (10, ["9.0"], set()),
        (10, ["8.6"], {"fp8"}),
        (11, ["7.5"], {"bf16", "mixed-bf16", "fp8"}),
        (None, ["8.9", "12.0"], set()),
        (None, ["8.6", "8.9"], {"fp8"}),
        (None, ["7.5", "8.9"], {"bf16", "mixed-bf16", "int8", "fp8"}),
    ],
)
def test_what_a_version_and_a_gpu_do_not_have(major, capabilities, refused):
    assert set(refusals(major, capabilities, "do something")) == refused


def test_why():
    assert refusals(8, ["9.0"], "")["fp8"] == "FP8 needs TensorRT 10 or newer, found 8"
    wanted = "FP8 needs compute capability 8.9 or higher, not 8.0, 8.6; choose others"
    assert refusals(None, ["8.0", "8.6", "12.0"], "choose others")["fp8"] == wanted
