from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest

from enginesmith.errors import GraphError, RecipeError, UnknownNameError
from enginesmith.passes import PASSES, parse_pass
from enginesmith.passes.base import Pass, PassContractError, PassResult

NET = "g (float[2] x) => (float[2] y) { a = Neg(x)  y = Relu(a) }"


@dataclasses.dataclass(frozen=True)
class Broken(Pass):
    name: ClassVar[str] = "broken"
    rename: str = ""
    says: bool = False
    detach: bool = False

    def apply(self, graph, context) -> PassResult:
        node = graph.model.graph.node(0)
        if self.rename:
            node.name = f"{node.name or ''}{self.rename}"
        if self.detach:
            graph.model.graph.remove(node)
        return PassResult(self.says)


def test_says_changed_but_is_not(rewrite):
    with pytest.raises(PassContractError, match="broken:says=true: modified=True, but the graph tells otherwise"):
        rewrite(Broken(says=True), NET)


def test_says_unchanged_but_is_changed(rewrite):
    with pytest.raises(PassContractError, match="broken:rename=n: modified=False, but the graph tells otherwise"):
        rewrite(Broken(rename="n"), NET)


def test_second_run_changes_again(rewrite):
    with pytest.raises(PassContractError, match="the second run changed the graph again"):
        rewrite(Broken(rename="n", says=True), NET)


def test_result_that_the_verifier_rejects(rewrite):
    with pytest.raises(GraphError, match="input 'a' of node 'y'"):
        rewrite(Broken(detach=True, says=True), NET)


def test_honest_pass(rewrite):
    assert rewrite(Broken(), NET)[1] == PassResult(modified=False)


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_prints_as_the_text_that_makes_it(name):
    made = parse_pass(name)
    assert parse_pass(str(made)) == made
    assert made.name == name


def test_unknown_names_and_options():
    with pytest.raises(UnknownNameError, match=r"unknown pass 'dedup'(.|\n)*did you mean 'dedupe'"):
        parse_pass("dedup")
    with pytest.raises(UnknownNameError, match=r"keep_oi(.|\n)*did you mean 'keep_io'"):
        parse_pass("cast:keep_oi=true")
    with pytest.raises(RecipeError, match="fp61"):
        parse_pass("cast:to=fp61")
