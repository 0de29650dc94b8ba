"""Layers of torch's LSTM, GRU and RNN as ONNX has them: directions stacked, gates in another order, biases joined.

    W (directions, gates*h, in)   R (directions, gates*h, h)   B (directions, 2*gates*h)

torch has a tensor for each layer and direction, with the gates i, f, g, o of an LSTM where ONNX has i, o, f, g, and
r, z, n of a GRU where ONNX has z, r, n.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import onnx_ir as ir
import torch

from ...graph.editing import is_constant
from ...quantization.layers import constant

GATES: Mapping[str, tuple[int, ...]] = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}
"""By operator, torch's number of each gate in the order of ONNX."""


@dataclasses.dataclass(frozen=True, eq=False)
class RecurrentMatch:
    """A layer of a recurrent module and its node.

    Attributes:
        name: of the module.
        node: of the graph.
        suffixes: what the names of its tensors end with, for each direction: ``l0``, ``l0_reverse``.
    """

    name: str
    node: ir.Node
    suffixes: tuple[str, ...]

    @property
    def keys(self) -> Iterator[str]:
        """The names of its tensors that are there where it has biases."""
        for suffix in self.suffixes:
            yield from (f"{self.name}.{kind}_{suffix}" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))

    def stacked(self, values: Mapping[str, np.ndarray]) -> dict[int, np.ndarray]:
        """The constants W, R and B, by the index of the input, from tensors by name."""
        gates = GATES[self.node.op_type]

        def ordered(kind: str, suffix: str) -> np.ndarray:
            blocks = np.split(values[f"{self.name}.{kind}_{suffix}"], len(gates))
            return np.concatenate([blocks[gate] for gate in gates])

        kinds = {1: ("weight_ih",), 2: ("weight_hh",), 3: ("bias_ih", "bias_hh")}
        return {
            index: np.stack([np.concatenate([ordered(kind, suffix) for kind in own]) for suffix in self.suffixes])
            for index, own in kinds.items()
            if all(f"{self.name}.{kind}_{suffix}" in values for kind in own for suffix in self.suffixes)
        }

    def cut(
        self, values: Mapping[str, np.ndarray], kept: Mapping[int, Mapping[int, np.ndarray]]
    ) -> Iterator[tuple[str, np.ndarray, dict[int, np.ndarray]]]:
        """Yields each tensor as it is where positions of the constants are left, with those of its own axes.

        Args:
            kept: by the index of the input, for each axis of the constant.
        """
        gates, rows, hidden = len(GATES[self.node.op_type]), kept.get(1, {}).get(1), kept.get(2, {}).get(2)
        if rows is not None:
            first, size = rows[: len(rows) // gates], len(values[f"{self.name}.weight_hh_{self.suffixes[0]}"]) // gates
            rows = (np.arange(gates)[:, None] * size + first).reshape(-1)
        columns = {"weight_ih": kept.get(1, {}).get(2), "weight_hh": hidden}
        for key in self.keys:
            if key in values:
                axes = {0: rows, 1: columns.get(key.rpartition(".")[2][:9])}
                told = {axis: places for axis, places in axes.items() if places is not None}
                array = values[key]
                for axis, places in told.items():
                    array = array.take(places, axis)
                yield key, array, told


def find(
    name: str, part: torch.nn.Module, nodes: Iterable[ir.Node], values: Mapping[str, np.ndarray]
) -> list[RecurrentMatch]:
    """The layers of a recurrent module among nodes; empty where one of them is not found."""
    if not isinstance(part, torch.nn.RNNBase) or part.proj_size:
        return []
    found: list[RecurrentMatch] = []
    kind, free = type(part).__name__, list(nodes)
    for layer in range(part.num_layers):
        suffixes = (f"l{layer}", f"l{layer}_reverse")[: 1 + part.bidirectional]
        tried = (RecurrentMatch(name, node, suffixes) for node in free if node.op_type == kind)
        one = next((match for match in tried if _holds(match, values)), None)
        if one is None:
            return []
        free.remove(one.node)
        found.append(one)
    return found


def _holds(one: RecurrentMatch, values: Mapping[str, np.ndarray]) -> bool:
    for index, array in one.stacked(values).items():
        value = one.node.inputs[index] if index < len(one.node.inputs) else None
        if value is None or not is_constant(value) or not np.array_equal(constant(value), array):
            return False
    return True
