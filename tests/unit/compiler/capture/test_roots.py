import numpy as np
import pytest

from enginesmith.compiler.capture.roots import divide_by_roots
from enginesmith.compiler.graph.probe import run

X = {"x": np.array([[3.0, 4.0], [6.0, 8.0]], np.float32)}


def rewritten(read, body, outputs="y"):
    given = ", ".join(f"float[N,2] {name}" for name in outputs)
    text = f"g (float[N,2] x) => ({given}) {{ {body} }}"
    before, after = read(text), read(text)
    count = divide_by_roots(after.model)
    after.verify()
    for name, array in run(before, X).items():
        assert run(after, X)[name] == pytest.approx(array, rel=1e-6)
    return count, after


@pytest.mark.parametrize("product", ["Mul(x, r)", "Mul(r, x)"])
def test_a_product_with_the_reciprocal_of_a_root_is_a_quotient(read, product):
    count, graph = rewritten(read, f"s = Mul(x, x)  q = Sqrt(s)  r = Reciprocal(q)  y = {product}")
    assert count == 1
    assert dict(graph.operators()) == {"Mul": 1, "Sqrt": 1, "Div": 1}
    assert divide_by_roots(graph.model) == 0


def test_a_reciprocal_that_is_read_otherwise_stays(read):
    count, graph = rewritten(read, "s = Mul(x, x)  q = Sqrt(s)  z = Reciprocal(q)  y = Mul(x, z)", "yz")
    assert count == 1
    assert graph.operators()["Reciprocal"] == 1


def test_the_square_of_a_reciprocal_is_divided_once(read):
    count, graph = rewritten(read, "s = Mul(x, x)  q = Sqrt(s)  r = Reciprocal(q)  y = Mul(r, r)")
    assert count == 1
    assert graph.operators()["Div"] == 1


def test_other_reciprocals_stay(read):
    count, graph = rewritten(read, "s = Exp(x)  r = Reciprocal(s)  y = Mul(x, r)")
    assert count == 0
    assert dict(graph.operators()) == {"Exp": 1, "Reciprocal": 1, "Mul": 1}
