"""Graphs that are fused, and compared with what they were."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from enginesmith.compiler.graph import Graph, probe
from enginesmith.passes.base import PassResult
from enginesmith.passes.fuse_transformer import FuseTransformer


def inputs_of(graph: Graph, batch: int = 3, length: int = 5) -> dict[str, np.ndarray]:
    random, found = np.random.default_rng(1), {}
    for value in graph.model.graph.inputs:
        shape = [axis if isinstance(axis, int) else {"B": batch, "S": length}[str(axis)] for axis in value.shape]
        made = random.standard_normal(shape) if value.dtype.name == "FLOAT" else random.integers(0, 2, shape)
        found[value.name] = made.astype(value.dtype.numpy())
    return found


@pytest.fixture
def fused(fill, context) -> Callable[[FuseTransformer, str], tuple[Graph, PassResult]]:
    """Fuses a graph, and checks that it computes what it did, at sizes that the pass did not see."""

    def apply(rule: FuseTransformer, text: str) -> tuple[Graph, PassResult]:
        graph = fill(text)
        inputs = inputs_of(graph)
        before, names = probe.run(graph, inputs), graph.output_names
        result = rule(graph, context(graph))
        assert graph.output_names == names
        after = probe.run(graph, inputs)
        for name, array in before.items():
            np.testing.assert_allclose(after[name], array, rtol=1e-4, atol=1e-5)
        return graph, result

    return apply


@pytest.fixture
def made() -> Callable[[Graph], dict[str, np.ndarray]]:
    return inputs_of
