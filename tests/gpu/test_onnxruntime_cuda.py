import dataclasses
import functools
import json
import threading
from pathlib import Path

import numpy as np
import onnx.helper
import onnx.numpy_helper
import onnx.parser
import pytest
import torch

from enginesmith.compiler.engine import load
from enginesmith.compiler.machine.environment import compute_capability, environment
from enginesmith.compiler.signature import AxisRange, Signature, TensorSpec
from enginesmith.compiler.storage.files import hashes
from enginesmith.errors import BuildError, DataError, EngineError, TargetUnavailableError
from enginesmith.targets import parse_target
from enginesmith.targets.base import BuildRequest
from enginesmith.targets.onnxruntime_cuda import OnnxRuntimeCuda

pytestmark = pytest.mark.gpu

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


@dataclasses.dataclass
class SavedGraph:
    model: onnx.ModelProto

    def save(self, path: Path) -> None:
        onnx.save(self.model, path)


@functools.cache  # made once, in the first thread: the seed is shared by all
def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(32, 64, 3, stride=2, padding=1),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(64, 10),
    ).eval()


def convolutions(precision: str) -> onnx.ModelProto:
    """`net` as a graph, its weights and activations in the precision, its input and output in fp32."""
    text = """
    <ir_version: 10, opset_import: ["" : 18]>
    agraph (float[batch, 3, 32, 32] image) => (float[batch, 10] logits)
    {
      x = Cast<to = DTYPE>(image)
      a = Conv<pads = [1, 1, 1, 1]>(x, w0, b0)
      b = Relu(a)
      c = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(b, w2, b2)
      d = Relu(c)
      e = GlobalAveragePool(d)
      f = Flatten(e)
      g = Gemm<transB = 1>(f, w6, b6)
      logits = Cast<to = 1>(g)
    }
    """.replace("DTYPE", "10" if precision == "fp16" else "1")
    model = onnx.parser.parse_model(text)
    dtype = np.float16 if precision == "fp16" else np.float32
    for name, tensor in net().state_dict().items():
        index, _, kind = name.partition(".")
        array = tensor.numpy().astype(dtype)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, f"{kind[0]}{index}"))
    return model


IMAGES = Signature(
    inputs=(TensorSpec("image", "float32", ("batch", 3, 32, 32)),),
    outputs=(TensorSpec("logits", "float32", ("batch", 10)),),
    axes={"batch": AxisRange(1, 4, 64)},
)
MATRIX = Signature(
    inputs=(TensorSpec("x", "float32", ("n", "n")),),
    outputs=(TensorSpec("y", "float32", ("n", "n")),),
    axes={"n": AxisRange(1, 4, 64)},
)


def images(batch: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, 3, 32, 32), dtype=np.float32)


def reference(array: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return net()(torch.from_numpy(array)).numpy()


def close(found, array: np.ndarray, precision: str) -> bool:
    wanted = reference(array)
    bound = {"fp32": 5e-5, "fp16": 5e-3}[precision]  # TF32 would be off by some 3e-4
    return found.shape == wanted.shape and np.linalg.norm(found - wanted) < bound * np.linalg.norm(wanted)


@pytest.fixture
def build(tmp_path):
    def build(text, *, precision="fp32", model=None, signature=IMAGES, sample=None):
        directory = tmp_path / f"onnxruntime-cuda-{len(list(tmp_path.iterdir()))}"
        directory.mkdir()
        request = BuildRequest(
            graph=SavedGraph(model or convolutions(precision)),
            model=None,
            signature=signature,
            precision=precision,
            sample=sample or {"image": images(4)},
            directory=directory,
            cache=tmp_path / "cache",
            log=lambda line: None,
        )
        target = parse_target(text)
        return target, directory, target.build(request)

    return build


@pytest.fixture(params=["onnxruntime-cuda", "onnxruntime-cuda:cuda_graph=false"], ids=["graph", "no graph"])
def engine(request, build):
    """A runner of the fp32 engine."""
    target, directory, info = build(request.param)
    assert info.details["cuda_graph"]["used"] is target.cuda_graph, info.details["cuda_graph"]
    runner = target.runner(directory, info)
    yield runner
    runner.close()


def test_the_target_is_available_and_knows_the_machine():
    found = OnnxRuntimeCuda().availability()
    assert found.run, found.reason
    assert set(found.versions) == {"onnxruntime", "cuda", "driver_supports"}
    capability = ".".join(map(str, torch.cuda.get_device_capability(0)))
    assert compute_capability() == environment()["gpus"][0]["compute_capability"] == capability


def test_a_gpu_that_is_not_there_is_refused():
    found = OnnxRuntimeCuda(device_id=99).availability()
    assert found.reason == "there is no GPU 99"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("options", ["", ":cuda_graph=false", ":prefer_nhwc=true,fuse_conv_bias=true"])
def test_engines_agree_with_torch(build, precision, options):
    target, directory, info = build(f"onnxruntime-cuda{options}", precision=precision)
    assert set(info.details["placement"]) == {CUDA}
    assert (info.details["memcpy"], info.details["on_cpu"]) == (0, {})
    runner = target.runner(directory, info)
    for batch in (1, 4, 1, 16):
        array = images(batch, seed=batch)
        logits = runner.run({"image": array})["logits"]
        assert isinstance(logits, np.ndarray)
        assert close(logits, array, precision)
    runner.close()


def test_cuda_tensors_go_in_and_out_without_leaving_the_device(engine):
    array = images(4)
    tensor = torch.from_numpy(array).cuda()
    output = engine.run({"image": tensor})["logits"]
    assert output.__dlpack_device__() == (2, 0)
    assert (output.shape, str(output.dtype)) == ((4, 10), "float32")
    first, second = torch.from_dlpack(output), torch.from_dlpack(output)
    assert first.is_cuda
    assert first.data_ptr() == second.data_ptr()
    assert close(first.cpu().numpy(), array, "fp32")
    assert close(output.numpy(), array, "fp32")


def test_outputs_are_kept_by_later_calls_and_by_close(engine):
    kept = [torch.from_dlpack(engine.run({"image": torch.from_numpy(images(2, n)).cuda()})["logits"]) for n in range(3)]
    engine.close()
    torch.cuda.synchronize()
    assert all(close(output.cpu().numpy(), images(2, n), "fp32") for n, output in enumerate(kept))


def test_an_output_is_an_input_again(build):
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18]> g (float[n, n] x) => (float[n, n] y) { y = Neg(x) }'
    )
    sample = {"x": np.ones((4, 4), np.float32)}
    target, directory, info = build("onnxruntime-cuda", model=model, signature=MATRIX, sample=sample)
    runner = target.runner(directory, info)
    once = runner.run({"x": torch.ones(2, 2).cuda()})["y"]
    np.testing.assert_array_equal(runner.run({"x": once})["y"].numpy(), np.ones((2, 2)))


def test_work_that_torch_has_not_finished_is_waited_for(engine):
    array = images(8)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        tensor = torch.zeros(8, 3, 32, 32, device="cuda")
        big = torch.ones(8192, 8192, device="cuda")
        for _ in range(20):
            big = big @ big / 8192
        tensor += torch.from_numpy(array).pin_memory().to("cuda", non_blocking=True) * big[0, 0]
        output = engine.run({"image": tensor})["logits"]
    assert close(output.numpy(), array, "fp32")


def test_tensors_that_cannot_be_shared_are_refused(engine):
    with pytest.raises(DataError, match="input 'image' is not contiguous"):
        engine.run({"image": torch.zeros(4, 32, 32, 3, device="cuda").permute(0, 3, 1, 2)})
    with pytest.raises(DataError, match=r"input 'image' cannot be shared by DLPack: .*grad"):
        engine.run({"image": torch.zeros(4, 3, 32, 32, device="cuda", requires_grad=True)})


def test_threads_share_an_engine(engine):
    for batch in (1, 2):  # CUDA lets no thread allocate while another one captures a graph
        engine.run({"image": images(batch)})
    net()
    right = []

    def work(seed):
        array = images(1 + seed % 2, seed)
        for number in range(20):
            value = torch.from_numpy(array).cuda() if number % 2 else array
            right.append(close(np.asarray(engine.run({"image": value})["logits"]), array, "fp32"))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 80


def test_bound_inputs_are_timed_on_the_device(engine):
    array = images(16)
    bound, other = engine.bind({"image": array}), engine.bind({"image": images(16, seed=1)})
    for _ in range(3):
        bound.run()
        other.run()
    bound.synchronize()
    host, device = bound.timed(10)
    assert len(host) == len(device) == 10
    assert all(0 < d <= h * 1.5 for h, d in zip(host, device, strict=True))
    assert close(bound.outputs()["logits"], array, "fp32")
    assert close(other.outputs()["logits"], images(16, seed=1), "fp32")


def test_integers_booleans_and_scalars_are_bound(build):
    model = onnx.parser.parse_model("""
    <ir_version: 10, opset_import: ["" : 18]>
    agraph (int64[n] ids, bool[n] mask, float scale) => (float[n] y, bool[n] flipped)
    {
      values = Cast<to = 1>(ids)
      scaled = Mul(values, scale)
      zero = Constant<value = float {0}>()
      y = Where(mask, scaled, zero)
      flipped = Not(mask)
    }
    """)
    signature = Signature(
        inputs=(
            TensorSpec("ids", "int64", ("n",)),
            TensorSpec("mask", "bool", ("n",)),
            TensorSpec("scale", "float32", ()),
        ),
        outputs=(TensorSpec("y", "float32", ("n",)), TensorSpec("flipped", "bool", ("n",))),
        axes={"n": AxisRange(1, 4, 8)},
    )
    ids, mask = np.arange(4), np.array([True, False, True, False])
    sample = {"ids": ids, "mask": mask, "scale": np.array(2, np.float32)}
    target, directory, info = build("onnxruntime-cuda", model=model, signature=signature, sample=sample)
    runner = target.runner(directory, info)
    for inputs in (sample, {name: torch.from_numpy(value).cuda() for name, value in sample.items()}):
        outputs = runner.run(inputs)
        np.testing.assert_array_equal(np.asarray(outputs["y"]), [0, 0, 4, 0])
        np.testing.assert_array_equal(np.asarray(outputs["flipped"]).astype(bool), ~mask)


def test_control_flow_runs_without_a_graph_and_says_so(build):
    model = onnx.parser.parse_model("""
    <ir_version: 10, opset_import: ["" : 18]>
    agraph (float[n, n] x) => (float[n, n] y)
    {
      total = ReduceSum<keepdims = 0>(x)
      zero = Constant<value = float {0}>()
      positive = Greater(total, zero)
      y = If (positive) <
        then_branch = g1 () => (float[n, n] y1) { y1 = Neg(x) },
        else_branch = g2 () => (float[n, n] y2) { y2 = Identity(x) }>
    }
    """)
    sample = {"x": np.ones((4, 4), np.float32)}
    target, directory, info = build("onnxruntime-cuda", model=model, signature=MATRIX, sample=sample)
    assert not info.details["cuda_graph"]["used"]
    assert "control flow" in info.details["cuda_graph"]["reason"]
    np.testing.assert_array_equal(target.runner(directory, info).run(sample)["y"], -sample["x"])


def test_nodes_on_the_cpu_are_counted_and_named(build):
    model = onnx.parser.parse_model("""
    <ir_version: 10, opset_import: ["" : 18]>
    agraph (float[n, n] x) => (float[n, n] y)
    { a = Neg(x)  d = Det(a)  y = Mul(x, d) }
    """)
    sample = {"x": np.eye(4, dtype=np.float32)}
    target, directory, info = build("onnxruntime-cuda", model=model, signature=MATRIX, sample=sample)
    assert info.details["placement"][CPU] >= 1
    assert list(info.details["on_cpu"]) == ["Det"]
    assert info.details["memcpy"] >= 2
    assert not info.details["cuda_graph"]["used"]
    assert "on the CPU: {'Det'" in info.details["cuda_graph"]["reason"]
    np.testing.assert_array_equal(target.runner(directory, info).run(sample)["y"], sample["x"])


def test_a_graph_that_runs_on_the_cpu_alone_is_refused(build):
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18]> g (float[n, n] x) => (float y) { y = Det(x) }'
    )
    signature = dataclasses.replace(MATRIX, outputs=(TensorSpec("y", "float32", ()),))
    sample = {"x": np.eye(4, dtype=np.float32)}
    with pytest.raises(BuildError, match=r"no node of model\.onnx runs on CUDAExecutionProvider"):
        build("onnxruntime-cuda", model=model, signature=signature, sample=sample)


def test_the_memory_limit_holds(build):
    with pytest.raises(EngineError, match="ONNX Runtime"):
        build("onnxruntime-cuda:memory_limit_mib=1", sample={"image": images(64)})


def test_a_bundle_loads_on_the_gpu_and_refuses_other_gpus(build, tmp_path):
    target, directory, info = build("onnxruntime-cuda")
    bundle = tmp_path / "bundle"
    for name, requires in (
        ("here", {"compute_capability": compute_capability()}),
        ("there", {"compute_capability": "1.0"}),
    ):
        folder = bundle / "engines" / name
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_bytes((directory / "model.onnx").read_bytes())
        dataclasses.replace(info, name=name, requires=requires).write(folder)
    records = [
        {"name": name, "target": target.name, "status": "ready", "validation": None} for name in ("there", "here")
    ]
    manifest = {"format": 1, "signature": IMAGES.to_json(), "engines": records, "benchmark": None}
    (bundle / "manifest.json").write_text(json.dumps({**manifest, "files": hashes(bundle)}))
    with load(bundle, device="cuda") as loaded:
        assert loaded.name == "here"
        output = loaded(image=torch.from_numpy(images(3)).cuda())
        assert close(torch.from_dlpack(output).cpu().numpy(), images(3), "fp32")
    with pytest.raises(EngineError, match=r"there was built for another machine\n.*1\.0"):
        load(bundle, "there")
    with pytest.raises(TargetUnavailableError, match="does not run on cpu"):
        load(bundle, "here", device="cpu")
