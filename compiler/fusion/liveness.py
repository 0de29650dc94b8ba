"""Whether a value would still be computed once another one is replaced."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir


def outlives(values: Iterable[ir.Value], *replaced: ir.Value) -> bool:
    """Whether an output of the graph, or of a subgraph, depends on one of these values by another way than `replaced`.

    Args:
        replaced: the values that other nodes will give.
    """
    pending, seen = list(values), set(replaced)
    while pending:
        value = pending.pop()
        if value in seen:
            continue
        seen.add(value)
        if value.is_graph_output():
            return True
        pending.extend(output for node in value.consumers() for output in node.outputs)
    return False
