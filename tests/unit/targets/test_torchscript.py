"""Tests of the torchscript target, and of what it shares with torch-inductor."""

from __future__ import annotations

import copy
import dataclasses
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from enginesmith.compiler.signature import AxisRange, Signature, TensorSpec
from enginesmith.compiler.sources import Model
from enginesmith.errors import BuildError, EngineError, RecipeError, TargetUnavailableError
from enginesmith.targets import parse_target
from enginesmith.targets._torch import TorchRunner
from enginesmith.targets.base import BuildRequest, EngineInfo, Runner

Arrays = Mapping[str, np.ndarray]
BATCH = {"batch": AxisRange(1, 4, 8)}
SIGNATURE = Signature(
    (TensorSpec("image", "float32", ("batch", 1, 8, 8)), TensorSpec("scale", "int64", ("batch",))),
    (TensorSpec("logits", "float32", ("batch", 10)), TensorSpec("doubled", "int64", ("batch",))),
    BATCH,
)
ONE = Signature((TensorSpec("x", "float32", ("batch", 3)),), (TensorSpec("y", "float32", ("batch", 3)),), BATCH)


class Network(torch.nn.Module):
    """Two inputs and two outputs, of floats and of integers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Flatten()
        )
        self.head = torch.nn.Linear(512, 10)

    def forward(self, image: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.head(self.body(image)) * scale[:, None], scale * 2


class Function(torch.nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.function(x),)


class Counter(torch.nn.Module):
    """Adds up what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.total += x.sum(0)  # type: ignore[operator]
        return (x + self.total,)


class ScriptedCounter(torch.nn.Module):
    """The same with an attribute, and control flow that a trace would lose."""

    def __init__(self) -> None:
        super().__init__()
        self.total = torch.zeros(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > 4:
            x = -x
        self.total = self.total + x.sum(0)
        return x + self.total


class ScriptedProduct(torch.nn.Module):
    """Multiplies by an attribute that is no buffer, which `half` leaves as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.eye(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


class TorchReference:
    def __init__(self, module: torch.nn.Module, signature: Signature) -> None:
        self.module, self.signature = module, signature
        self.state = copy.deepcopy(module)

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        with torch.no_grad():
            outputs = self.module(*(torch.from_numpy(inputs[spec.name]) for spec in self.signature.inputs))
        return {s.name: o.numpy().copy() for s, o in zip(self.signature.outputs, outputs, strict=True)}

    def reset(self) -> None:
        if isinstance(self.module, Function) and isinstance(self.module.function, torch.jit.ScriptModule):
            self.module.function = copy.deepcopy(self.state.get_submodule("function"))
        self.module.load_state_dict(self.state.state_dict())


def sample(signature: Signature, batch: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    arrays = {name: generator.standard_normal(shape) for name, shape in signature.shapes({"batch": batch}).items()}
    return {spec.name: (3 * arrays[spec.name]).astype(spec.dtype) for spec in signature.inputs}


def make_request(
    folder: Path,
    module: torch.nn.Module,
    signature: Signature = ONE,
    *,
    precision: str = "fp32",
    stateful: bool = False,
) -> BuildRequest:
    module = module.eval()
    directory = folder / f"engine-{precision}"
    directory.mkdir()
    return BuildRequest(
        graph=None,
        model=Model("module", TorchReference(module, signature), signature, module, None, "f", 1, stateful),
        signature=signature,
        precision=precision,
        sample=sample(signature),
        directory=directory,
        cache=folder / "cache",
        log=lambda line: None,
    )


def build(request: BuildRequest, text: str = "torchscript") -> tuple[EngineInfo, Runner]:
    target = parse_target(text)
    info = target.build(request)
    info.write(request.directory)
    again = EngineInfo.read(request.directory)
    assert again == info
    return info, target.runner(request.directory, again)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[BuildRequest, EngineInfo, Runner]:
    request = make_request(tmp_path_factory.mktemp("torchscript"), Network(), SIGNATURE)
    return request, *build(request)


def test_an_engine_does_what_the_model_does_at_every_batch(built: tuple[BuildRequest, EngineInfo, Runner]) -> None:
    request, info, runner = built
    assert (info.name, info.target, info.entry, info.stateful) == ("engine-fp32", "torchscript", "model.pt", False)
    assert info.versions["torch"].startswith(info.requires["torch"])
    for batch in (1, 4, 8):
        inputs = sample(SIGNATURE, batch, seed=batch)
        outputs, expected = runner.run(inputs), request.model.reference.run(inputs)
        np.testing.assert_allclose(outputs["logits"], expected["logits"], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(outputs["doubled"], expected["doubled"])


def test_tensors_give_tensors_and_arrays_give_arrays(built: tuple[BuildRequest, EngineInfo, Runner]) -> None:
    _, _, runner = built
    arrays = sample(SIGNATURE)
    outputs = runner.run(arrays)
    tensors = runner.run({name: torch.from_numpy(array) for name, array in arrays.items()})
    assert isinstance(outputs["logits"], np.ndarray)
    assert isinstance(tensors["logits"], torch.Tensor)
    np.testing.assert_array_equal(outputs["logits"], tensors["logits"].numpy())

    class Foreign:
        """A DLPack tensor of another library."""

        def __init__(self, array: np.ndarray) -> None:
            self.array, self.dtype, self.shape = array, array.dtype, array.shape

        def __dlpack__(self, **arguments: Any) -> Any:
            return self.array.__dlpack__()

        def __dlpack_device__(self) -> Any:
            return self.array.__dlpack_device__()

    foreign = runner.run({name: Foreign(array) for name, array in arrays.items()})
    np.testing.assert_array_equal(outputs["logits"], foreign["logits"].numpy())


def test_inputs_that_are_read_only_or_not_contiguous_are_read_right(
    built: tuple[BuildRequest, EngineInfo, Runner],
) -> None:
    _, _, runner = built
    arrays = sample(SIGNATURE)
    expected = runner.run(arrays)["logits"]
    arrays["image"] = np.asfortranarray(arrays["image"])
    arrays["image"].flags.writeable = False
    np.testing.assert_array_equal(runner.run(arrays)["logits"], expected)


def test_bound_inputs_are_run_repeatedly_and_timed(built: tuple[BuildRequest, EngineInfo, Runner]) -> None:
    _, _, runner = built
    arrays = sample(SIGNATURE)
    bound = runner.bind(arrays)
    bound.run()
    bound.synchronize()
    np.testing.assert_array_equal(bound.outputs()["logits"], runner.run(arrays)["logits"])
    host, device = bound.timed(3)
    assert len(host) == 3
    assert min(host) > 0
    assert device is None


def test_calls_from_several_threads_do_not_mix(built: tuple[BuildRequest, EngineInfo, Runner]) -> None:
    _, _, runner = built
    inputs = [sample(SIGNATURE, 1 + seed % 8, seed) for seed in range(16)]
    expected = [runner.run(arrays)["logits"] for arrays in inputs]
    found: dict[int, np.ndarray] = {}

    def work(start: int) -> None:
        for index in range(start, 16, 4):
            found[index] = runner.run(inputs[index])["logits"]

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, array in enumerate(expected):
        np.testing.assert_allclose(found[index], array, rtol=1e-5, atol=1e-5)


def test_a_failing_run_and_a_closed_engine_are_engine_errors(tmp_path: Path) -> None:
    _, runner = build(make_request(tmp_path, Network(), SIGNATURE), "torchscript:freeze=false,optimize=false")
    with pytest.raises(
        EngineError, match=r"engine engine-fp32 failed to run: .*to have 1 channels, but got 3 channels"
    ):
        runner.run({**sample(SIGNATURE), "image": np.ones((4, 3, 8, 8), np.float32)})
    runner.close()
    with pytest.raises(EngineError, match="engine engine-fp32 is closed"):
        runner.run(sample(SIGNATURE))


def test_fp16_computes_in_half_precision_and_keeps_inputs_and_outputs(tmp_path: Path) -> None:
    request = make_request(tmp_path, Network(), SIGNATURE, precision="fp16")
    _, runner = build(request)
    outputs, expected = runner.run(request.sample), request.model.reference.run(request.sample)
    assert outputs["logits"].dtype == np.float32
    error = np.abs(outputs["logits"] - expected["logits"]).max() / np.abs(expected["logits"]).max()
    assert 1e-5 < error < 5e-3
    assert next(request.model.module.parameters()).dtype is torch.float32  # type: ignore[union-attr]


def test_baked_sizes_are_refused(tmp_path: Path) -> None:
    size = Function(lambda x: x.reshape(int(x.shape[0]), -1) / len(x))
    with pytest.raises(BuildError, match=r"the traced module does not do what the model does at batch=1") as caught:
        parse_target("torchscript").build(make_request(tmp_path, size))
    assert caught.value.hint is not None


def test_baked_branches_are_refused(tmp_path: Path) -> None:
    branch = Function(lambda x: -x if x.shape[0] > 3 else x)
    with pytest.raises(BuildError, match="the traced module does not do what the model does at batch=1"):
        parse_target("torchscript").build(make_request(tmp_path, branch))


def test_values_that_overflow_float16_are_told(tmp_path: Path) -> None:
    module = Function(lambda x: x * 1e6 / 1e6)
    with pytest.raises(BuildError, match=r"(?s)values overflow float16 in the traced module.*y: .*build .* in fp32"):
        build(make_request(tmp_path, module, precision="fp16"))


def test_warnings_of_torch_go_to_the_log(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    class Moved(Function):
        def _apply(self, *arguments: Any, **options: Any) -> Moved:
            warnings.warn("moved", UserWarning, stacklevel=1)  # as torch does of gradients that TorchScript keeps
            return super()._apply(*arguments, **options)  # type: ignore[no-any-return]

    log: list[str] = []
    request = make_request(tmp_path, Moved(torch.jit.script(ScriptedCounter())), stateful=True)
    recwarn.clear()  # of torch.jit.script
    _, runner = build(dataclasses.replace(request, log=log.append))
    runner.reset()
    assert not recwarn.list
    assert "UserWarning: moved" in log
    assert any(line.startswith("DeprecationWarning: `torch.jit.trace` is deprecated") for line in log)


def test_a_model_that_cannot_be_traced_is_refused(tmp_path: Path) -> None:
    def fail(x: torch.Tensor) -> torch.Tensor:
        raise KeyError("mode")

    with pytest.raises(BuildError, match=r"torch\.jit could not trace the model in fp32") as caught:
        parse_target("torchscript").build(make_request(tmp_path, Function(fail)))
    assert caught.value.found == "KeyError: 'mode'"


def test_state_that_stays_in_fp32_is_told(tmp_path: Path) -> None:
    module = Function(torch.jit.script(ScriptedProduct()))
    with pytest.raises(BuildError, match=r"torch\.jit could not trace the model in fp16") as caught:
        parse_target("torchscript").build(make_request(tmp_path, module, precision="fp16"))
    assert "expected m1 and m2 to have the same dtype" in str(caught.value.found)


def test_an_onnx_source_has_nothing_to_trace(tmp_path: Path) -> None:
    request = make_request(tmp_path, Function(torch.sin))
    request = dataclasses.replace(request, model=dataclasses.replace(request.model, kind="onnx", module=None))
    with pytest.raises(BuildError, match="a model of kind 'onnx' holds no torch module"):
        parse_target("torchscript").build(request)


def test_a_model_that_cannot_be_copied_is_refused(tmp_path: Path) -> None:
    request = make_request(tmp_path, Function(torch.sin), precision="fp16")
    request.model.module.lock = threading.Lock()  # type: ignore[union-attr]
    with pytest.raises(BuildError, match="the model cannot be copied: cannot pickle"):
        parse_target("torchscript").build(request)


@pytest.mark.parametrize(
    "module", [Counter(), Function(torch.jit.script(ScriptedCounter()))], ids=["buffer", "script attribute"]
)
def test_state_is_kept_between_calls_and_reset(tmp_path: Path, module: torch.nn.Module) -> None:
    request = make_request(tmp_path, module, stateful=True)
    info, runner = build(request)
    assert info.stateful
    reference = request.model.reference
    for _ in range(2):
        runner.reset()
        reference.reset()
        results = []
        for batch in (2, 4, 8):
            inputs = sample(ONE, batch, seed=batch)
            results.append((runner.run(inputs)["y"], reference.run(inputs)["y"]))
        for found, expected in results:
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_an_archive_that_is_damaged_is_an_engine_error(tmp_path: Path) -> None:
    request = make_request(tmp_path, Function(torch.sin))
    info, _ = build(request)
    (request.directory / "model.pt").write_bytes(b"PK")
    with pytest.raises(EngineError, match="engine engine-fp32 cannot be opened"):
        parse_target("torchscript").runner(request.directory, info)


def test_convolutions_of_fp32_engines_are_not_in_tf32_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed: list[bool] = []

    def engine(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        allowed.append(torch.backends.cudnn.allow_tf32)
        return (x,)

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    for precision, device in (("fp32", "cuda"), ("fp16", "cuda"), ("fp32", "cpu")):
        TorchRunner(lambda: engine, EngineInfo("e", "t", precision, "f", ONE), device).call([torch.ones(1, 3)])
    assert allowed == [False, True, True]
    assert torch.backends.cudnn.allow_tf32


def test_a_missing_gpu_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    target = parse_target("torchscript:device=cuda")
    state = target.availability()
    assert not state.build
    assert state.reason == f"torch {torch.__version__} is built without CUDA"
    with pytest.raises(TargetUnavailableError, match="is built without CUDA"):
        target.build(make_request(tmp_path, Function(torch.sin)))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert target.availability().reason == f"torch {torch.__version__} finds no GPU"


def test_torch_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    state = parse_target("torchscript").availability()
    assert (state.build, state.run, state.install) == (False, False, "pip install torch")
    assert state.reason.startswith("torch cannot be imported")


def test_an_old_torch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.8.1+cpu")
    state = parse_target("torchscript").availability()
    assert (state.build, state.run) == (False, False)
    assert state.reason == "torch 2.8.1+cpu is too old, 2.9 or newer is needed"


def test_options_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(RecipeError, match="optimize=true needs freeze=true"):
        parse_target("torchscript:freeze=false")
    assert str(parse_target("torchscript:freeze=false,optimize=false")) == "torchscript:freeze=false,optimize=false"
    with pytest.raises(RecipeError, match="option 'device' of 'torchscript' has an unknown value"):
        parse_target("torchscript:device=gpu")
