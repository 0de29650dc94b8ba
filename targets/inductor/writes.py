"""What nodes of an exported program read and write: such programs write in place, so that nodes may not move freely."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch


def stays(read: Iterable[Any], first: torch.fx.Node, last: torch.fx.Node) -> bool:
    """Whether no node between two, of which one comes before the other, writes what these nodes give or are views of.

    Views are those that the schemas of operators tell.
    """
    bases = {base for value in read for base in _bases(value)}
    node = first.next
    while node is not last:
        if not bases.isdisjoint(base for value in _written(node) for base in _bases(value)):
            return False
        node = node.next
    return True


def _written(node: torch.fx.Node) -> Iterator[Any]:
    """The arguments that an operator writes; all of one that has no schema, as those with graphs of their own."""
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        yield from node.all_input_nodes
    for argument, value in _arguments(node):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield value


def _bases(value: Any) -> set[torch.fx.Node]:
    """The nodes whose memory a value is in."""
    if isinstance(value, list | tuple):
        return {base for part in value for base in _bases(part)}
    if not isinstance(value, torch.fx.Node):
        return set()
    if value.target is operator.getitem:
        return _bases(value.args[0])
    if isinstance(value.target, torch._ops.HigherOrderOperator):
        return {value}.union(*map(_bases, value.all_input_nodes))
    viewed = [_bases(given) for argument, given in _arguments(value) if argument.alias_info is not None]
    makes_view = viewed and any(result.alias_info is not None for result in value.target._schema.returns)  # type: ignore[union-attr]
    return set().union(*viewed) if makes_view else {value}


def _arguments(node: torch.fx.Node) -> Iterator[tuple[Any, Any]]:
    """What the schema of an operator says of each argument, and the argument."""
    if isinstance(node.target, torch._ops.OpOverload):
        for number, argument in enumerate(node.target._schema.arguments):
            yield argument, node.args[number] if number < len(node.args) else node.kwargs.get(argument.name)
