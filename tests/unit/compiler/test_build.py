import pytest

from enginesmith.compiler.build import _mismatch, check_left
from enginesmith.errors import BuildError
from enginesmith.targets import parse_target

CAPTURE = {"exporter": None, "opset": None, "attempts": [], "checks": []}


@pytest.mark.parametrize(
    ("target", "precision", "reason"),
    [
        ("onnxruntime-cuda", "int8", "ONNX Runtime has no INT8 kernels for NVIDIA GPUs"),
        ("tensorrt-rtx", "fp8", "FP8 needs compute capability 8.9 or higher, not 8.0, 8.6"),
        ("torchscript", "bf16", "no engines of precision bf16; it builds fp32, fp16"),
        ("torch-inductor", "bf16", ""),
    ],
)
def test_why_a_target_does_not_build_a_precision(target, precision, reason):
    found = _mismatch(parse_target(target), precision, None, CAPTURE)
    assert found.startswith(reason)
    assert bool(found) == bool(reason)


def test_a_required_target_may_lack_what_is_optional():
    def engine(name, sibling=None, status="ready"):
        return {
            "name": name,
            "target": "cpu",
            "sibling": sibling,
            "status": status,
            "reason": "no kernels",
            "to_do": "",
        }

    check_left([engine("cpu-fp32"), engine("cpu-fp32-sparse", "cpu-fp32", "unavailable")], ["cpu"])
    with pytest.raises(BuildError, match="required engine 'cpu-fp16' cannot be had"):
        check_left([engine("cpu-fp32"), engine("cpu-fp16", None, "failed")], ["cpu"])
