"""Graphs as ONNX text, and passes run on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx.numpy_helper
import onnx.parser
import pytest

from enginesmith.compiler.calibration import Calibration
from enginesmith.compiler.graph import Graph
from enginesmith.compiler.signature import AxisRange, Signature, TensorSpec
from enginesmith.passes.base import Context, Pass, PassResult

HEADER = '<ir_version: 8, opset_import: ["": 17, "local": 1, "com.microsoft": 1]>\n'


def read_graph(text: str) -> Graph:
    """A graph from ONNX text; the header with the opsets may be left out."""
    graph = Graph.from_proto(onnx.parser.parse_model(text if text.lstrip().startswith("<") else HEADER + text))
    graph.infer()
    return graph


def context_of(graph: Graph, samples: object = None) -> Context:
    """A context whose signature is read from the graph; each dynamic axis ranges over 1..3..8."""
    specs = []
    axes = {}
    for value in graph.model.graph.inputs:
        shape = tuple(d if isinstance(d, int) else str(d) for d in value.shape)
        axes.update({d: AxisRange(1, 3, 8) for d in shape if isinstance(d, str)})
        dtype = value.dtype.numpy().name
        specs.append(TensorSpec(value.name, dtype, shape))
    return Context(Signature(inputs=tuple(specs), axes=axes), samples=samples)


def fill_graph(text: str) -> Graph:
    """A graph from ONNX text whose float constants, declared without values, hold noise."""
    model = onnx.parser.parse_model(text if text.lstrip().startswith("<") else HEADER + text)
    random = np.random.default_rng(0)
    for value in model.graph.value_info:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        array = (random.standard_normal(shape) / np.sqrt(np.prod(shape[1:]) + 1)).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))
    del model.graph.value_info[:]
    graph = Graph.from_proto(model)
    graph.infer()
    graph.verify()
    return graph


class Noise(list):
    """Batches of noise that pass for the user's data."""

    description = "made up"
    random = False
    digest = "made up"


def calibrated_of(graph: Graph, batches: int = 4, size: int = 16) -> Context:
    """A context with noise to calibrate on; a dynamic axis is `size` long, whole numbers are 0 or 1."""
    random = np.random.default_rng(1)
    samples = Noise()
    for _ in range(batches):
        sample = {}
        for value in graph.model.graph.inputs:
            shape = [axis if isinstance(axis, int) else size for axis in value.shape]
            dtype = value.dtype.numpy()
            made = random.standard_normal(shape) if dtype.kind == "f" else random.integers(0, 2, shape)
            sample[value.name] = made.astype(dtype)
        samples.append(sample)
    return dataclasses.replace(context_of(graph), calibration=Calibration(samples))


@pytest.fixture(scope="session")
def calibrated() -> Callable[..., Context]:
    return calibrated_of


@pytest.fixture(scope="session")
def fill() -> Callable[[str], Graph]:
    return fill_graph


@pytest.fixture(scope="session")
def read() -> Callable[[str], Graph]:
    return read_graph


@pytest.fixture(scope="session")
def context() -> Callable[..., Context]:
    return context_of


@pytest.fixture(scope="session")
def rewrite() -> Callable[..., tuple[Graph, PassResult]]:
    """Runs a pass, with its base-class checks, on a graph given as text."""

    def apply(rule: Pass, before: str, samples: object = None) -> tuple[Graph, PassResult]:
        graph = read_graph(before)
        graph.verify()
        result = rule(graph, context_of(graph, samples))
        return graph, result

    return apply
