"""Rotary embedding, and queries, keys and values as one product, in attention over a cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from enginesmith.compiler.calibration import Calibration
from enginesmith.compiler.fusion.unfolding import unfolded
from enginesmith.compiler.graph import Graph
from enginesmith.compiler.graph.probe import Tapped, run
from enginesmith.compiler.signature import AxisRange, Signature, TensorSpec
from enginesmith.compiler.sparse_attention.kinds import Window
from enginesmith.compiler.sparse_attention.rewrite import rewrite
from enginesmith.passes import parse_pass
from enginesmith.passes.base import Context, PassResult

HEADS, ROOM, WIDE, TEXT, ROWS = 2, 16, 24, 40, 3

HALVES = """
  NAME_a, NAME_b = Split<axis = -1, num_outputs = 2>(NAME_x)  NAME_n = Neg(NAME_b)
  NAME_h = Concat<axis = -1>(NAME_n, NAME_a)"""
INTERLEAVED = """
  NAME_a = Slice(NAME_x, zeros, many, threes, twos)  NAME_b = Slice(NAME_x, ones, many, threes, twos)
  NAME_n = Neg(NAME_b)  NAME_bs = Unsqueeze(NAME_n, last)  NAME_as = Unsqueeze(NAME_a, last)
  NAME_s = Concat<axis = -1>(NAME_bs, NAME_as)  NAME_shape = Shape(NAME_x)  NAME_h = Reshape(NAME_s, NAME_shape)"""
SUM = "  NAME_c = Mul(NAME_x, cos)  NAME_d = Mul(NAME_h, sin)  NAME_y = Add(NAME_c, NAME_d)"


@dataclasses.dataclass(frozen=True)
class Kind:
    """What is turned: so many channels of each head, at positions in the text or at places in the cache."""

    width: int = 16
    turned: int = 16
    interleaved: bool = False
    evicting: bool = False

    def text(self) -> str:
        """A layer of attention over a cache, as a decoder; constants are noise."""
        inner, pairs = HEADS * self.width, self.turned // 2
        position = "int64[batch] position, " if self.evicting else ""
        cache = f"float[batch, {HEADS}, {ROOM}, {self.width}]"
        both = (
            "stack = Unsqueeze(angle, last)  stacked = Concat<axis = -1>(stack, stack)  both = Reshape(stacked, flat)"
        )
        return f"""<ir_version: 8, opset_import: ["": 18]>
        decoder (int64[batch, time] ids, int64[batch] past, int64[batch] count, {position}{cache} key, {cache} value)
            => (float[batch, time, {WIDE}] logits, {cache} key_out, {cache} value_out)
        <float[{WIDE}, {WIDE}] embedding,
         float[{WIDE}, {inner}] wq, float[{WIDE}, {inner}] wk, float[{WIDE}, {inner}] wv,
         float[{inner}, {WIDE}] wo, float[{inner}] bq, float[{inner}] bk, float[{inner}] bv, float[{pairs}] frequencies,
         int64 zero = {{0}}, int64 one = {{1}}, int64[1] zeros = {{0}}, int64[1] ones = {{1}}, int64[1] twos = {{2}},
         int64[1] threes = {{3}}, int64[1] last = {{-1}}, int64[1] many = {{1000}}, int64[2] outer = {{1, 3}},
         int64[2] parts = {{{self.turned}, {self.width - self.turned}}}, int64[3] flat = {{0, 0, {self.turned}}},
         int64[4] split = {{0, 0, {HEADS}, {self.width}}}, int64[3] join = {{0, 0, {inner}}}, float scale = {{0.25}},
         float open = {{0}}, float never = {{-1e30}}, int64[{ROOM}] slots = {{{", ".join(map(str, range(ROOM)))}}}> {{
          shape = Shape(ids)  length = Gather<axis = 0>(shape, one)  steps = Range(zero, length, one)
          first = Unsqueeze(past, ones)  places = Add(first, steps)
          {"start = Unsqueeze(position, ones)  spots = Add(start, steps)" if self.evicting else ""}
          spot = Unsqueeze({"spots" if self.evicting else "places"}, twos)  real = Cast<to = 1>(spot)
          angle = Mul(real, frequencies)  {both if self.interleaved else "both = Concat<axis = -1>(angle, angle)"}
          cos2 = Cos(both)  sin2 = Sin(both)  cos = Unsqueeze(cos2, ones)  sin = Unsqueeze(sin2, ones)
          h = Gather(embedding, ids)
          q0 = MatMul(h, wq)  q1 = Add(q0, bq)  q2 = Reshape(q1, split)  q = Transpose<perm = [0, 2, 1, 3]>(q2)
          k0 = MatMul(h, wk)  k1 = Add(k0, bk)  k2 = Reshape(k1, split)  k = Transpose<perm = [0, 2, 1, 3]>(k2)
          v0 = MatMul(h, wv)  v1 = Add(v0, bv)  v2 = Reshape(v1, split)  v = Transpose<perm = [0, 2, 1, 3]>(v2)
          {self._turned("q")}  {self._turned("k")}
          spread = Unsqueeze(places, outer)  kshape = Shape(k_r)  index = Expand(spread, kshape)
          key_out = ScatterElements<axis = 2>(key, index, k_r)
          value_out = ScatterElements<axis = 2>(value, index, v)
          kt = Transpose<perm = [0, 1, 3, 2]>(key_out)  products = MatMul(q_r, kt)  scores = Mul(products, scale)
          seen = LessOrEqual(slots, spread)  mask = Where(seen, open, never)  masked = Add(scores, mask)
          [softmax] weights = Softmax<axis = -1>(masked)  sums = MatMul(weights, value_out)
          turned = Transpose<perm = [0, 2, 1, 3]>(sums)  joined = Reshape(turned, join)  logits = MatMul(joined, wo)
        }}"""

    def _turned(self, name: str) -> str:
        turn = ((INTERLEAVED if self.interleaved else HALVES) + SUM).replace("NAME", name)
        if self.turned == self.width:
            return turn.replace(f"{name}_x", name).replace(f"{name}_y", f"{name}_r")
        cut = f"{name}_x, {name}_rest = Split<axis = -1>({name}, parts)"
        return f"{cut} {turn}  {name}_r = Concat<axis = -1>({name}_y, {name}_rest)"

    def signature(self, positions: int | None = TEXT) -> Signature:
        cache = ("batch", HEADS, ROOM, self.width)
        numbers = ("past", "count", *(("position",) if self.evicting else ()))
        return Signature(
            inputs=(
                TensorSpec("ids", "int64", ("batch", "time")),
                *(TensorSpec(name, "int64", ("batch",)) for name in numbers),
                *(TensorSpec(name, "float32", cache) for name in ("key", "value")),
            ),
            outputs=(
                TensorSpec("logits", "float32", ("batch", "time", WIDE)),
                *(TensorSpec(f"{name}_out", "float32", cache) for name in ("key", "value")),
            ),
            axes={"batch": AxisRange(1, 1, ROWS), "time": AxisRange(1, 1, ROOM)},
            states={"key": "key_out", "value": "value_out"},
            positions=positions if self.evicting else None,
        )

    def inputs(self, past: tuple[int, ...], length: int) -> dict[str, np.ndarray]:
        """Caches that are filled up to `past`, of texts of which 2, 9, ... tokens were dropped."""
        generator = np.random.default_rng(3)
        filled = (np.arange(ROOM) < np.array(past)[:, None])[:, None, :, None]
        shape = (len(past), HEADS, ROOM, self.width)
        dropped = np.array([0 if begun == 0 else 2 + 7 * row for row, begun in enumerate(past)])
        return {
            "ids": generator.integers(0, WIDE, (len(past), length)),
            "past": np.array(past),
            "count": np.full(len(past), length),
            **({"position": np.array(past) + dropped} if self.evicting else {}),
            **{
                name: np.where(filled, generator.standard_normal(shape), 0).astype(np.float32)
                for name in ("key", "value")
            },
        }


CALLS = [((0, 0, 0), 5), ((3, 11, 0), 1), ((7,), 4), ((0,), ROOM)]

Make = Callable[..., tuple[Graph, Graph, PassResult]]


@pytest.fixture
def fused(fill) -> Make:
    """The graph, and the same after fuse-attention."""

    def make(kind: Kind, *changes: tuple[str, str], positions: int | None = TEXT) -> tuple[Graph, Graph, PassResult]:
        text = kind.text()
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        before, after = fill(text), fill(text)
        return before, after, parse_pass("fuse-attention")(after, Context(kind.signature(positions)))

    return make


def attention(graph: Graph):
    (node,) = (node for node in graph.model.graph if node.op_type == "GroupQueryAttention")
    return node


def agrees(before: Graph, after: Graph, kind: Kind) -> bool:
    for past, length in CALLS:
        inputs = kind.inputs(past, length)
        expected, found = run(before, inputs), run(after, inputs)
        for name, array in expected.items():
            np.testing.assert_allclose(found[name], array, rtol=1e-3, atol=1e-5)
    return True


@pytest.mark.parametrize("kind", [Kind(), Kind(interleaved=True), Kind(32, 16)], ids=str)
def test_the_operator_turns_queries_and_keys_itself(fused, kind):
    before, after, result = fused(kind)
    assert result.changes == {"attention over a cache fused": 1}
    assert result.refusals == ()
    node = attention(after)
    assert node.attributes["do_rotary"].as_int() == 1
    assert node.attributes["rotary_interleaved"].as_int() == kind.interleaved
    assert [value.shape for value in node.inputs[7:]] == [[ROOM, kind.turned // 2]] * 2
    assert not after.operators().keys() & {"Cos", "Sin", "Neg", "com.microsoft::RotaryEmbedding", "Reshape"}
    assert agrees(before, after, kind)


@pytest.mark.parametrize(
    "kind", [Kind(8, 8), Kind(16, 8), Kind(24, 16, interleaved=True), Kind(evicting=True)], ids=str
)
def test_a_node_of_its_own_turns_what_the_operator_would_not(fused, kind):
    before, after, result = fused(kind)
    assert result.changes == {"attention over a cache fused": 1}
    assert result.refusals == ()
    assert after.operators()["com.microsoft::RotaryEmbedding"] == 2
    assert "do_rotary" not in attention(after).attributes
    assert not after.operators().keys() & {"Cos", "Sin", "Neg"}
    rows = TEXT if kind.evicting else ROOM
    tables = [value for value in after.model.graph.initializers.values() if "/cos" in value.name]
    assert [value.shape for value in tables] == [[rows, kind.turned // 2]]
    assert agrees(before, after, kind)


ANGLE = "angle = Mul(real, frequencies)"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            [("spot = Unsqueeze(places, twos)", "more = Unsqueeze(count, ones)  spot0 = Add(places, more)  "
              "spot = Unsqueeze(spot0, twos)")],
            "its angles are computed from positions that have no known end",
        ),
        (
            [("real = Cast<to = 1>(spot)",
              "tall = Unsqueeze(past, inner)  more = Add(spot, tall)  real = Cast<to = 1>(more)"),
             ("int64[2] outer = {1, 3}", "int64[2] outer = {1, 3}, int64[2] inner = {1, 2}")],
            "its angles are computed from something else than positions",
        ),
        (
            [(ANGLE, "low = ReduceMin<keepdims = 1>(real)  moved = Sub(real, low)  angle = Mul(moved, frequencies)")],
            "its angles are not those of pairs, one for each position",
        ),
        (
            [("both = Concat<axis = -1>(angle, angle)",
              "less = Mul(angle, angle)  both = Concat<axis = -1>(angle, less)")],
            "its angles are not those of pairs, one for each position",
        ),
        (
            [("k_c = Mul(k, cos)", "cos9 = Mul(cos, scale)  k_c = Mul(k, cos9)")],
            "queries and keys are turned by different angles",
        ),
    ],
    ids=["no end", "something else", "all of a call", "no pairs", "different"],
)  # fmt: skip
def test_what_turns_otherwise_stays_and_attention_is_fused(fused, changes, reason):
    before, after, result = fused(Kind(), *changes)
    (refusal,) = result.refusals
    assert result.changes == {"attention over a cache fused": 1}
    assert refusal.reason == f"its rotary embedding stays as it was: {reason}"
    assert refusal.node == "softmax"
    assert after.operators()["Cos"] == 1
    assert agrees(before, after, Kind())


def test_positions_of_a_text_without_an_end_stay(fused):
    _, after, result = fused(Kind(evicting=True), positions=None)
    assert result.refusals[0].reason.endswith("its angles are computed from positions that have no known end")
    assert after.operators()["Cos"] == 1


def test_queries_keys_and_values_are_one_product_with_its_bias(fused):
    before, after, _ = fused(Kind())
    query, key, value = attention(after).inputs[:3]
    assert (key, value) == (None, None)
    assert query.producer().op_type == "Add"
    product = query.producer().inputs[0].producer()
    assert product.op_type == "MatMul"
    assert product.inputs[1].shape == [WIDE, 3 * HEADS * 16]
    assert after.operators()["MatMul"] == 2
    constants = [graph.model.graph.initializers for graph in (before, after)]
    parts = [constants[0][name].const_value.numpy() for name in ("wq", "wk", "wv")]
    np.testing.assert_array_equal(product.inputs[1].const_value.numpy(), np.concatenate(parts, axis=1))


def test_one_product_that_was_split_is_taken_whole(fused):
    kind = Kind()
    changes = [
        ("q0 = MatMul(h, wq)  q1 = Add(q0, bq)", "all = MatMul(h, wall)  q1, k1, v1 = Split<axis = -1>(all, thirds)"),
        ("k0 = MatMul(h, wk)  k1 = Add(k0, bk)", ""),
        ("v0 = MatMul(h, wv)  v1 = Add(v0, bv)", ""),
        (f"float[{WIDE}, 32] wq,", f"float[{WIDE}, 96] wall, int64[3] thirds = {{32, 32, 32}},"),
    ]
    before, after, _ = fused(kind, *changes)
    assert attention(after).inputs[0].name == "all"
    assert attention(after).inputs[1:3] == (None, None)
    assert agrees(before, after, kind)


@pytest.mark.parametrize(
    "change",
    [
        ("v0 = MatMul(h, wv)", "g = Neg(h)  v0 = MatMul(g, wv)"),  # products of different tensors
        ("logits = MatMul(joined, wo)", "out = MatMul(joined, wo)  used = Concat<axis = -1>(k0, q1)  "
         "mean = ReduceMean(used, last)  logits = Add(out, mean)"),  # keys are read elsewhere
    ],
    ids=["of different tensors", "read elsewhere"],
)  # fmt: skip
def test_products_that_stay_are_given_each_by_itself(fused, change):
    before, after, _ = fused(Kind(), change)
    assert None not in attention(after).inputs
    assert after.operators()["MatMul"] == 4
    assert agrees(before, after, Kind())


@pytest.mark.parametrize("kind", [Kind(), Kind(interleaved=True), Kind(32, 16), Kind(evicting=True)], ids=str)
def test_unfolded_it_computes_the_same(fused, kind):
    before, after, _ = fused(kind)
    plain = unfolded(after)
    plain.verify()
    node = attention(plain)
    assert len(node.inputs) == 7
    assert None not in node.inputs
    assert set(node.attributes) == {"num_heads", "kv_num_heads", "scale"}
    assert node.name == attention(after).name
    assert agrees(before, plain, kind)


@pytest.mark.parametrize("kind", [Kind(), Kind(interleaved=True)], ids=str)
def test_sparse_attention_takes_it_apart(fused, kind):
    before, after, _ = fused(kind)
    rewrite(after, {attention(after).name: Window(ROOM)})
    after.verify()
    assert after.operators()["com.microsoft::RotaryEmbedding"] == 2
    assert agrees(before, after, kind)


class Prompts:
    """Random ones."""

    description, random = "prompts", False

    def __iter__(self):
        yield Kind().inputs((0, 0), ROOM)


def test_caches_of_8_bits_have_the_scales_of_turned_keys(fused):
    before, after, _ = fused(Kind())
    context = Context(Kind().signature(), calibration=Calibration(Prompts()))
    result = parse_pass("kv-cache:headroom=1")(after, context)
    assert result.changes == {"caches stored in 8 bits": 2}
    taps = {"key": "k_r", "value": "v"}
    found = Tapped(before, taps.values())(next(iter(Prompts())))
    for name, tensor in taps.items():
        peaks = np.abs(found[tensor]).max(axis=(0, 2))
        scale = after.model.graph.initializers[f"{name}/scale"].const_value.numpy()
        np.testing.assert_allclose(scale[0, :, 0], peaks / 127, rtol=1e-4)
    inputs = Kind().inputs((0,), 9)
    expected, got = run(before, inputs), run(after, inputs)
    for name, array in expected.items():
        assert np.abs(got[name] - array).max() < 0.02 * np.abs(array).max()
