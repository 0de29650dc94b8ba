"""Small torch networks to prune, and how they are pruned and built again in tests."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from enginesmith.compiler.calibration import Calibration
from enginesmith.compiler.capture import capture
from enginesmith.compiler.graph import Graph
from enginesmith.compiler.signature import parse_inputs
from enginesmith.compiler.sources import Model, load_model
from enginesmith.compiler.storage.cache import Cache
from enginesmith.passes import parse_pass
from enginesmith.passes.base import Context, PassResult

BATCH = 16


class Samples(list):
    description = "made up"
    random = False
    digest = None


@dataclasses.dataclass(frozen=True)
class Pruned:
    """A network before and after."""

    model: Model
    whole: Graph
    graph: Graph
    result: PassResult
    samples: Samples


class Residual(nn.Module):
    """Convolutions are declared before the normalizations, so that order of declaration tells nothing."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.down = None if into == out else nn.Sequential(nn.Conv2d(into, out, 1, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + (x if self.down is None else self.down(x))).relu()


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.size = width // heads
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        y = self.before(x)
        q, k, v = (part(y).view(batch, length, -1, self.size).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = (q @ k.transpose(2, 3) / self.size**0.5).softmax(-1) @ v
        x = x + self.o(y.transpose(1, 2).reshape(batch, length, -1))
        return x + self.down(nn.functional.gelu(self.up(self.after(x))))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM | nn.GRU], **options: Any) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.rnn = kind(16, 16, batch_first=True, **options)
        self.last = nn.Linear(16 * (1 + bool(options.get("bidirectional"))), 5)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.last(self.rnn(self.first(input).relu())[0])


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(20, 16), nn.Parameter(torch.randn(1, 6, 16))
        self.norm, self.mix, self.last = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.words((4 * input).long().clamp(0, 19)) + self.places)
        return self.last(x + self.mix(x).relu())


def resnet() -> nn.Module:
    stem = (nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(
        *stem, Residual(16, 16), Residual(16, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)
    )


def mixed_convolutions() -> nn.Module:
    depthwise = (nn.Conv2d(3, 16, 1, bias=False), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.BatchNorm2d(16))
    transposed = (nn.ConvTranspose2d(16, 16, 2, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, bias=False))
    return nn.Sequential(*depthwise, nn.ReLU(), *transposed, nn.ReLU(), nn.Conv2d(16, 4, 1))


def mlp() -> nn.Module:
    hidden = (nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 32, bias=False), nn.BatchNorm1d(32), nn.GELU())
    return nn.Sequential(*hidden, nn.Linear(32, 32, bias=False), nn.ReLU(), nn.Linear(32, 1))


def transformer() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 32), Attention(32, 8), Attention(32, 8), nn.Linear(32, 5))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet": (resnet, (3, 8, 8)),
    "mixed convolutions": (mixed_convolutions, (3, 8, 8)),
    "mlp": (mlp, (24,)),
    "transformer": (transformer, (6, 12)),
    "words": (Words, (6,)),
    "lstm, both ways": (lambda: Recurrent(nn.LSTM, bidirectional=True), (5, 12)),
    "lstm, two layers": (lambda: Recurrent(nn.LSTM, num_layers=2), (5, 12)),
    "gru": (lambda: Recurrent(nn.GRU), (5, 12)),
}


def _trained(module: nn.Module) -> nn.Module:
    """The module with normalizations that are not as they were made."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
            nn.init.normal_(part.running_mean)
            nn.init.uniform_(part.running_var, 0.5, 2)
    return module


def _prune(
    module: nn.Module,
    shape: tuple[int, ...],
    folder: Path,
    *,
    exporter: str = "torchscript",
    text: str = "prune:ratio=0.5,multiple=4,sensitivity=false",
    arrays: np.ndarray | None = None,
) -> Pruned:
    """Captures a module of one input named `input`, and prunes it on made-up data."""
    size = "x".join(map(str, shape))
    model = load_model(
        copy.deepcopy(module), inputs=parse_inputs([f"input:1x{size}"], [f"input:0=1..{BATCH}..{BATCH}"])
    )
    generator = np.random.default_rng(0)
    made = generator.standard_normal((4 * BATCH, *shape)).astype(np.float32) if arrays is None else arrays
    samples = Samples({"input": batch} for batch in np.split(made, len(made) // BATCH))
    captured = capture(
        model,
        exporter=exporter,  # type: ignore[arg-type]
        opset_range=(9, 20),
        samples=samples,
        seed=0,
        directory=folder,
        log=lambda line: None,
        cache=Cache(),
    )
    graph = captured.graph
    assert graph is not None, captured.record
    context = Context(model.signature, samples, Calibration(samples))
    for step in ("simplify", "dedupe"):
        parse_pass(step)(graph, context)
    whole = graph.clone()
    return Pruned(model, whole, graph, parse_pass(text)(graph, context), samples)


def _with_sizes(module: nn.Module, mapping: dict[str, Any]) -> nn.Module:
    """A module of the sizes of a mapping, its numbers lost."""
    for name, told in mapping["modules"].items():
        part = module.get_submodule(name)
        for size, values in told["sizes"].items():
            setattr(part, size, tuple(values["after"]) if isinstance(values["after"], list) else values["after"])
        if told["bias_added"]:
            part.bias = nn.Parameter(torch.zeros(1))
    for key, told in mapping["tensors"].items():
        owner, _, name = key.rpartition(".")
        part, lost = module.get_submodule(owner), torch.full(told["after"], torch.nan)
        if name in part._parameters:
            setattr(part, name, nn.Parameter(lost))
        elif part._buffers[name].is_floating_point():
            setattr(part, name, lost)
    return module


@pytest.fixture
def network():
    """Makes a network of that name, and gives it with the shape of its input: always the same numbers."""

    def made(name: str) -> tuple[nn.Module, tuple[int, ...]]:
        torch.manual_seed(0)
        factory, shape = NETWORKS[name]
        return _trained(factory()), shape

    return made


@pytest.fixture
def prune(tmp_path):
    """`_prune` in a folder of the test's own."""
    return lambda module, shape, **options: _prune(module, shape, tmp_path, **options)


@pytest.fixture
def with_sizes():
    """`_with_sizes`."""
    return _with_sizes
