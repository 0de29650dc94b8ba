"""Graphs that choose the next token of each row on the device, beside an engine that gives logits.

    token, best, past + 1 = greedy(logits, past)
    token, best, past + 1 = draw(logits, past, temperature, chance)
    token, best, past + 1 = draw-among(logits, past, temperature, chance, top_k, top_p)

`logits` are (batch, vocabulary), `token` (batch, 1) of int64, `best` (batch) the largest logit, by which the host sees
whether they are numbers. Of equal logits the first is the largest. `chance` (batch) are numbers from 0 up to 1: tokens
are drawn as `compiler.generation.sampling` draws them on the host, in float64 too.

The graphs are written when the engine is built, as running them needs no package to write ONNX.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ...compiler.signature import Signature
from ...compiler.states import LOGITS

GREEDY, DRAW, AMONG = "greedy.onnx", "draw.onnx", "draw-among.onnx"

_BLOCK = 256
"""Sums are taken in blocks: ONNX Runtime's CumSum adds up what stands before each element, for each by itself."""

_HEADER = '<ir_version: 8, opset_import: ["": 17]>'
_ENDS = "{kind}[batch, {size}] logits, int64[batch] past"
_RESULTS = "int64[batch, 1] token, {kind}[batch] best, int64[batch] past_next"
_FIRST = """
  best = ReduceMax<axes = [1], keepdims = 0>(logits)
  past_next = Add(past, one)
"""
_GREEDY = """
  top = Unsqueeze(best, axis1)  largest = Equal(logits, top)
  numbered = Where(largest, places, behind)  token32 = ReduceMin<axes = [1], keepdims = 1>(numbered)
  token = Cast<to = 7>(token32)
"""
_SCORES = """
  wide = Cast<to = 11>(logits)  scores = Div(wide, temperature)
"""
_PROBABILITIES = """
  probabilities = Softmax<axis = 1>(scores)
"""
_AMONG = """
  sorted, order = TopK<axis = 1>(scores, all)
  place = Sub(top_k, one)  least = Gather<axis = 1>(sorted, place)
  low = Less(sorted, least)  likely = Where(low, never, sorted)
  shares = Softmax<axis = 1>(likely)
  flat_blocks = Pad(shares, padding)  blocks_a = Reshape(flat_blocks, split)
  inner_a = CumSum(blocks_a, two)  ends_a = Slice(inner_a, last, end, axis2)
  before_a = CumSum<exclusive = 1>(ends_a, first)  all_a = Add(inner_a, before_a)  sums_a = Reshape(all_a, join)
  whole_a = Slice(sums_a, none, size, axis1)  so_far = Sub(whole_a, shares)
  out = GreaterOrEqual(so_far, top_p)  chosen = Where(out, never, likely)
  picked = Softmax<axis = 1>(chosen)
  probabilities = ScatterElements<axis = 1>(scores, order, picked)
"""
_DRAW = """
  padded = Pad(probabilities, padding)  blocks = Reshape(padded, split)
  inner = CumSum(blocks, two)  ends = Slice(inner, last, end, axis2)
  before = CumSum<exclusive = 1>(ends, first)  all_sums = Add(inner, before)  sums = Reshape(all_sums, join)
  total = Slice(sums, last, end, axis1)  drawn = Unsqueeze(chance, axis1)  target = Mul(total, drawn)
  passed = LessOrEqual(sums, target)  each = Cast<to = 11>(passed)
  count = ReduceSum<keepdims = 1>(each, axis1)  token = Cast<to = 7>(count)
"""


def write(folder: Path, signature: Signature) -> None:
    """Writes the graphs for the logits of a decoder."""
    logits = next(spec for spec in signature.outputs if spec.name == LOGITS)
    for name, model in graphs(int(logits.shape[-1]), logits.dtype).items():
        (folder / name).write_bytes(model.SerializeToString())


def graphs(vocabulary: int, dtype: str) -> dict[str, Any]:
    """For so many tokens, and logits in float32 or float16: an `onnx.ModelProto` by the name of the file."""
    import onnx.numpy_helper
    import onnx.parser

    kind = {"float32": "float", "float16": "float16"}[dtype]
    drawing = "double temperature, double[batch] chance"
    bodies = {
        GREEDY: ("", _FIRST + _GREEDY),
        DRAW: (drawing, _FIRST + _SCORES + _PROBABILITIES + _DRAW),
        AMONG: (f"{drawing}, int64[1] top_k, double top_p", _FIRST + _SCORES + _AMONG + _DRAW),
    }
    constants = _constants(vocabulary)
    made = {}
    for name, (inputs, body) in bodies.items():
        ends = ", ".join(filter(None, (_ENDS.format(kind=kind, size=vocabulary), inputs)))
        text = f"{_HEADER} choose ({ends}) => ({_RESULTS.format(kind=kind)}) {{{body}}}"
        made[name] = onnx.parser.parse_model(text)
        read = {given for node in made[name].graph.node for given in node.input}
        made[name].graph.initializer.extend(
            onnx.numpy_helper.from_array(array, constant) for constant, array in constants.items() if constant in read
        )
    return made


def _constants(vocabulary: int) -> dict[str, np.ndarray]:
    blocks = -(-vocabulary // _BLOCK)
    long = {
        "one": 1, "axis1": [1], "axis2": [2], "none": [0], "size": [vocabulary], "all": [vocabulary],
        "padding": [0, 0, 0, blocks * _BLOCK - vocabulary], "split": [-1, blocks, _BLOCK],
        "join": [-1, blocks * _BLOCK], "two": 2, "first": 1, "last": [-1], "end": [np.iinfo(np.int64).max],
    }  # fmt: skip
    return {
        **{name: np.array(value, np.int64) for name, value in long.items()},
        "places": np.arange(vocabulary, dtype=np.int32)[None],
        "behind": np.array(vocabulary, np.int32),
        "never": np.array(-np.inf),
    }
