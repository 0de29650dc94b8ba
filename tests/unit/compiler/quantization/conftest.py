"""Graphs with weights drawn at random."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from enginesmith.compiler.graph import Graph


@pytest.fixture(scope="session")
def weighted(read) -> Callable[..., Graph]:
    """A graph from ONNX text, whose inputs but for the first become initializers of random numbers."""

    def make(text: str, seed: int = 0) -> Graph:
        graph = read(text)
        generator = np.random.default_rng(seed)
        main = graph.model.graph
        for value in list(main.inputs)[1:]:
            array = generator.standard_normal(tuple(value.shape)).astype(np.float32)
            array *= generator.uniform(0.1, 5, (array.shape[0], *[1] * (array.ndim - 1))).astype(np.float32)
            main.inputs.remove(value)
            value.const_value = ir.Tensor(array, name=value.name)
            main.register_initializer(value)
        graph.infer()
        graph.verify()
        return graph

    return make
