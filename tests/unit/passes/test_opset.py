import numpy as np
import pytest

from enginesmith.passes import parse_pass
from enginesmith.passes.opset import Opset

GRAPH = (
    '<ir_version: 8, opset_import: ["" : {opset}]> g (float[n,4] x) => (float[n,4] y) {{ r = Relu(x) y = {last}(r) }}'
)


def text(opset, last="Sigmoid"):
    return GRAPH.format(opset=opset, last=last)


@pytest.mark.parametrize("opset", [11, 13, 17, 18])
def test_an_older_graph_is_converted(rewrite, opset):
    graph, result = rewrite(Opset(), text(opset))
    assert graph.opset == 19
    assert result.changes == {"opsets raised": 19 - opset}
    assert graph.operators() == {"Relu": 1, "Sigmoid": 1}


@pytest.mark.parametrize("opset", [19, 20])
def test_a_newer_graph_stays(rewrite, opset):
    graph, result = rewrite(Opset(), text(opset))
    assert (graph.opset, result.modified) == (opset, False)


def test_weights_and_results_stay(rewrite):
    from enginesmith.compiler.graph.probe import run

    before = (
        '<ir_version: 8, opset_import: ["" : 13]> g (float[n,2] x) => (float[n,2] y) <float[2,2] w = {1, 2, 3, 4}> '
    )
    graph, _ = rewrite(parse_pass("opset:least=21"), before + "{ y = MatMul(x, w) }")
    assert graph.opset == 21
    (y,) = run(graph, {"x": np.ones((1, 2), np.float32)}).values()
    np.testing.assert_allclose(y, [[4, 6]])


def test_an_opset_that_does_not_exist_is_refused(rewrite):
    graph, result = rewrite(Opset(least=99), text(17))
    assert graph.opset == 17
    assert "opset 17 could not be converted to 99" in result.refusals[0].reason
