"""TensorRT on a GPU, in the worker that ENGINESMITH_TENSORRT_PYTHON names and in that interpreter itself.

``python tests/gpu/test_tensorrt.py`` builds, runs and times a small network without pytest and prints all there is.
"""

import json
import os
import subprocess
import tempfile
import traceback
from pathlib import Path

import numpy as np
import onnx.parser
import pytest
import torch

from enginesmith.compiler.graph import Graph
from enginesmith.compiler.signature import AxisRange, Signature, TensorSpec, parse_inputs
from enginesmith.compiler.sources import Model
from enginesmith.errors import BuildError, EngineError, EngineMismatchError, EnginesmithError
from enginesmith.targets import parse_target
from enginesmith.targets.base import BuildRequest
from enginesmith.targets.trt import build as trt
from enginesmith.targets.trt.runner import WorkerRunner

pytestmark = pytest.mark.gpu

SIGNATURE = Signature(
    inputs=(TensorSpec("image", "float32", ("batch", 3, 16, 16)),),
    outputs=(TensorSpec("scores", "float32", ("batch", 10)), TensorSpec("label", "int64", ("batch",))),
    axes={"batch": AxisRange(1, 4, 8)},
)

CNN = """
<ir_version: 8, opset_import: ["" : 17]>
cnn (float[batch,3,16,16] image) => (float[batch,10] scores, int64[batch] label)
<float[8,3,3,3] w, float[8] b, float[8,10] w2, float[10] b2>
{
  conv = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(image, w, b)
  relu = Relu(conv)
  pool = GlobalAveragePool(relu)
  flat = Flatten<axis=1>(pool)
  logits = Gemm(flat, w2, b2)
  scores = Softmax<axis=1>(logits)
  label = ArgMax<axis=1, keepdims=0>(logits)
}
"""

CNN_FP16 = """
<ir_version: 8, opset_import: ["" : 17]>
cnn (float[batch,3,16,16] image) => (float[batch,10] scores, int64[batch] label)
<float16[8,3,3,3] w, float16[8] b, float16[8,10] w2, float16[10] b2>
{
  half = Cast<to=10>(image)
  conv = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(half, w, b)
  relu = Relu(conv)
  pool = GlobalAveragePool(relu)
  flat = Flatten<axis=1>(pool)
  small = Gemm(flat, w2, b2)
  logits = Cast<to=1>(small)
  scores = Softmax<axis=1>(logits)
  label = ArgMax<axis=1, keepdims=0>(logits)
}
"""

TOKENS = """
<ir_version: 8, opset_import: ["" : 17]>
g (int64[batch,4] tokens) => (float[batch,4,2] y) <float[5,2] table> { y = Gather<axis=0>(table, tokens) }
"""

POSITIVE = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[batch,4] x) => (int64[2,n] where) { where = NonZero(x) }
"""

UNKNOWN = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[batch,4] x) => (float[batch,4] y) { y = NoSuchOperator(x) }
"""

SPARSE = """
<ir_version: 8, opset_import: ["" : 17]>
g (float16[batch,256,14,14] x) => (float16[batch,256,14,14] y) <float16[256,256,3,3] sparse>
{ [conv] y = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, sparse) }
"""

SHAPES = {"w": (8, 3, 3, 3), "b": (8,), "w2": (8, 10), "b2": (10,), "table": (5, 2), "sparse": (256, 256, 3, 3)}

IN_PROCESS = """
import json, sys
import numpy as np
sys.path.insert(0, {package!r})
from pathlib import Path
from enginesmith.compiler.signature import Signature
from enginesmith.targets.trt import build as trt
from enginesmith.targets.trt.runner import SessionRunner, open_engine
assert trt.in_process("tensorrt")
signature = Signature.from_json(json.loads({signature!r}))
runner = open_engine("tensorrt", Path({plan!r}), signature, cuda_graph=True)
assert isinstance(runner, SessionRunner)
image = np.load({image!r})
for _ in range(3):
    outputs = runner.run({{"image": image}})
bound = runner.bind({{"image": image}})
host, device = bound.timed(20)
assert len(host) == len(device) == 20
runner.close()
np.savez({outputs!r}, **outputs)
"""


def weights():
    random = np.random.default_rng(0)
    made = {name: random.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    made["sparse"][:, ::2] = 0
    return made


def graph(text):
    model = onnx.parser.parse_model(text)
    values = weights()
    for value in model.graph.value_info:
        half = value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
        array = values[value.name].astype(np.float16 if half else np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))
    return Graph.from_proto(model)


def images(batch):
    return np.random.default_rng(batch).standard_normal((batch, 3, 16, 16)).astype(np.float32)


def expected(image):
    """The network in torch on the CPU, in fp32."""
    parts = {name: torch.from_numpy(value) for name, value in weights().items()}
    hidden = torch.nn.functional.conv2d(torch.from_numpy(image), parts["w"], parts["b"], padding=1).relu()
    logits = hidden.mean((2, 3)) @ parts["w2"] + parts["b2"]
    best, second = logits.topk(2).values.T
    return {"scores": logits.softmax(1).numpy(), "label": logits.argmax(1).numpy(), "lead": (best - second).numpy()}


def check(outputs, image, atol):
    wanted = expected(image)
    np.testing.assert_allclose(outputs["scores"], wanted["scores"], atol=atol)
    clear = wanted["lead"] > 10 * atol  # rounding may swap classes whose logits are closer
    np.testing.assert_array_equal(outputs["label"][clear], wanted["label"][clear])
    assert outputs["label"].dtype == np.int64


def make(folder, text, signature=SIGNATURE, target="tensorrt", precision="fp32", log=print, **options):
    """Builds an engine, and returns its folder and what is known of it."""
    directory, cache = Path(folder) / f"engine-{precision}", Path(folder) / "cache"
    directory.mkdir(exist_ok=True)
    cache.mkdir(exist_ok=True)
    model = Model("onnx", None, signature, None, None, "", 0)
    request = BuildRequest(graph(text), model, signature, precision, {}, directory, cache, log, **options)
    return directory, parse_target(target).build(request)


@pytest.fixture(scope="module", autouse=True)
def available():
    availability = parse_target("tensorrt").availability()
    if not availability.run:
        pytest.skip(availability.reason)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """An fp32 engine for batches of 1 to 8."""
    return make(tmp_path_factory.mktemp("fp32"), CNN)


@pytest.fixture
def runner(engine):
    directory, info = engine
    runner = parse_target("tensorrt").runner(directory, info)
    yield runner
    runner.close()


def test_the_builder_finds_sparse_weights_and_tells_what_it_made_of_them(tmp_path):
    signature = parse_inputs(["x:1x256x14x14:float16"], ["x:0=1..8..8"])
    _, info = make(tmp_path, SPARSE, signature, precision="fp16")
    assert "SPARSE_WEIGHTS" in info.details["flags"]
    found = info.details["sparse"]
    assert found["source"] == "log of the build"
    assert [name for name in found["eligible"] if "conv" in name]
    assert set(found["picked"]) <= set(found["eligible"])


def test_an_engine_gives_what_torch_gives_at_every_batch_size(runner):
    for batch in (1, 8, 3, 3, 3, 4, 5, 6, 7, 1):
        check(runner.run({"image": images(batch)}), images(batch), 1e-5)


def test_what_is_recorded_of_an_engine(engine):
    directory, info = engine
    found = trt.look("tensorrt")
    assert info.requires == {"tensorrt": found.release, "compute_capability": found.compute_capability}
    assert info.details["layers"]["source"] == "engine"
    assert info.details["layers"]["count"] > 0
    assert info.details["device_memory_bytes"] >= 0
    assert "TF32" not in info.details["flags"]
    assert json.loads((directory / "layers.json").read_text())["layers"]


@pytest.mark.parametrize("options", ["", ":cuda_graph=false", ":profiles=points", ":builder_level=1,workspace_gib=1"])
def test_fp16_is_what_the_graph_says(tmp_path, options):
    directory, info = make(tmp_path, CNN_FP16, target=f"tensorrt{options}", precision="fp16")
    assert {"FP16", "STRONGLY_TYPED"} & set(info.details["flags"])
    runner = parse_target(f"tensorrt{options}").runner(directory, info)
    for batch in (1, 2, 4, 8, 4):
        check(runner.run({"image": images(batch)}), images(batch), 2e-2)
    runner.close()


def test_fp16_arithmetic_is_not_pinned_to_fp32(tmp_path):
    text = CNN_FP16.replace("Softmax<axis=1>(logits)", "Identity(logits)")
    _, info = make(tmp_path, text, precision="fp16")
    assert "PREFER_PRECISION_CONSTRAINTS" not in info.details["flags"]


def test_bounds_of_several_sizes_are_timed_side_by_side(runner):
    bounds = {batch: runner.bind({"image": images(batch)}) for batch in (1, 4, 8)}
    for _ in range(2):
        for batch, bound in bounds.items():
            host, device = bound.timed(10)
            assert len(host) == len(device) == 10
            assert 0 < min(device) <= max(host)
            assert bound.graph_refusal == ""
            check(bound.outputs(), images(batch), 1e-5)


def test_two_runners_have_a_process_each(engine):
    directory, info = engine
    runners = [parse_target("tensorrt").runner(directory, info) for _ in range(2)]
    for runner in runners:
        check(runner.run({"image": images(2)}), images(2), 1e-5)
        runner.close()


def test_the_timing_cache_is_kept_and_read(tmp_path):
    for precision in ("first", "second"):
        make(tmp_path, CNN, precision=precision)
    (cache,) = (tmp_path / "cache").glob("*.timing")
    assert cache.stat().st_size > 0


def test_integers_of_64_bits(tmp_path):
    signature = parse_inputs(["tokens:1x4:int64"], ["tokens:0=1..2..3"])
    signature = Signature(signature.inputs, (TensorSpec("y", "float32", ("batch", 4, 2)),), signature.axes)
    directory, info = make(tmp_path, TOKENS, signature)
    runner = parse_target("tensorrt").runner(directory, info)
    tokens = np.array([[0, 1, 2, 3], [4, 0, 4, 0]])
    np.testing.assert_allclose(runner.run({"tokens": tokens})["y"], weights()["table"][tokens], rtol=1e-6)
    runner.close()


def test_outputs_whose_shape_depends_on_values(tmp_path):
    signature = parse_inputs(["x:1x4"], ["x:0=1..2..3"])
    signature = Signature(signature.inputs, (TensorSpec("where", "int64", (2, "?")),), signature.axes)
    directory, info = make(tmp_path, POSITIVE, signature)
    runner = parse_target("tensorrt").runner(directory, info)
    for x in (np.eye(3, 4, dtype=np.float32), np.ones((2, 4), np.float32)):
        where = runner.run({"x": x})["where"]
        assert sorted(where.T.tolist()) == np.argwhere(x).tolist()  # TensorRT promises no order
    runner.close()


def test_a_graph_that_the_parser_refuses(tmp_path):
    signature = parse_inputs(["x:1x4"], ["x:0=1..2..3"])
    with pytest.raises(BuildError, match=r"(?s)failed.*NoSuchOperator"):
        make(tmp_path, UNKNOWN, signature)


def test_a_plan_that_was_changed(engine, tmp_path):
    directory, info = engine
    (tmp_path / info.entry).write_bytes(b"x" * 64 + (directory / info.entry).read_bytes()[64:])
    with pytest.raises(EngineMismatchError, match="cannot open the engine"):
        parse_target("tensorrt").runner(tmp_path, info)


def test_a_worker_that_is_killed(runner):
    if not isinstance(runner, WorkerRunner):
        pytest.skip("the engine runs in this process")
    os.kill(runner._worker.pid, 9)
    with pytest.raises(EngineError, match="was killed"):
        runner.run({"image": images(1)})


def test_an_engine_in_the_process_that_has_tensorrt(engine, tmp_path):
    directory, info = engine
    np.save(tmp_path / "image.npy", images(3))
    package = tmp_path / "package"
    package.mkdir()
    (package / "enginesmith").symlink_to(Path(__file__).resolve().parents[2])
    code = IN_PROCESS.format(
        package=str(package),
        signature=json.dumps(SIGNATURE.to_json()),
        plan=str(directory / info.entry),
        image=str(tmp_path / "image.npy"),
        outputs=str(tmp_path / "outputs.npz"),
    )
    environment = {key: value for key, value in os.environ.items() if key != trt.variable("tensorrt")}
    command = [trt.interpreter("tensorrt"), "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check(np.load(tmp_path / "outputs.npz"), images(3), 1e-5)


@pytest.mark.skipif(not trt.in_process("tensorrt"), reason="TensorRT is in another interpreter")
def test_tensors_of_torch_stay_on_the_gpu(runner):
    for batch in (2, 2, 2, 5):
        outputs = runner.run({"image": torch.from_numpy(images(batch)).cuda()})
        assert all(tensor.is_cuda for tensor in outputs.values())
        check({name: tensor.cpu().numpy() for name, tensor in outputs.items()}, images(batch), 1e-5)


def attempt(text, precision, atol):
    """Builds, runs and times; an error is printed whole."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            directory, info = make(folder, text, precision=precision)
            print(f"\n=== {precision}: built", json.dumps(info.details, indent=1))
            runner = parse_target("tensorrt").runner(directory, info)
            for batch in (1, 4, 8):
                check(runner.run({"image": images(batch)}), images(batch), atol)
                bound = runner.bind({"image": images(batch)})
                host, device = bound.timed(200)
                medians = [round(float(np.median(times)), 4) for times in (host, device)]
                print(f"batch {batch}: host and device p50 in ms {medians}, no graph: {bound.graph_refusal!r}")
            runner.close()
    except (EnginesmithError, AssertionError, OSError, RuntimeError):
        traceback.print_exc()


if __name__ == "__main__":
    print(trt.command("tensorrt"), trt.look("tensorrt"), parse_target("tensorrt").availability(), sep="\n")
    attempt(CNN, "fp32", 1e-5)
    attempt(CNN_FP16, "fp16", 2e-2)
