"""Graphs that choose the next token of each row on the device, beside an engine that gives logits.

    token, best, past + 1 = greedy(logits, past)
    token, best, past + 1 = draw(logits, past, temperature, chance)
    token, best, past + 1 = draw-among(logits, past, temperature, chance, top_k, top_p)

`logits` are (batch, vocabulary), `token` (batch, 1) of int64, `best` (batch) the largest logit, infinity where one of
them is no number. Of equal logits the first is the largest. Each row has options of its own, (batch) each; `chance` are
numbers from 0 up to 1: tokens are drawn as `compiler.generation.sampling` draws them on the host, in float64 too.

The graphs are written when the engine is built, as running them needs no package to write ONNX.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...compiler.generation import sampling
from ...compiler.signature import Signature
from ...compiler.states import LOGITS

GREEDY, DRAW, AMONG = (f"{kind}.onnx" for kind in (sampling.GREEDY, sampling.DRAW, sampling.AMONG))

_BLOCK = 256
"""Rows are gone through in blocks: ONNX Runtime's CumSum adds up what stands before an element for each by itself, and
its reductions over a long axis, which are cuDNN's, take milliseconds for 32 rows."""

_HEADER = '<ir_version: 8, opset_import: ["": 17]>'
_ENDS = "{kind}[batch, {size}] logits, int64[batch] past"
_RESULTS = "int64[batch, 1] token, {kind}[batch] best, int64[batch] past_next"
_FIRST = """
  unknown = IsNaN(logits)  known = Where(unknown, most, logits)
  filled = Pad(known, padding, lowest)  blocks = Reshape(filled, of_block)
  tops, inner = TopK<axis = 1>(blocks, one)  by_block = Reshape(tops, of_blocks)
  top, block = TopK<axis = 1>(by_block, one)  best = Squeeze(top, one)
  past_next = Add(past, one)
"""
_GREEDY = """
  inner_by_block = Reshape(inner, of_blocks)  within = GatherElements<axis = 1>(inner_by_block, block)
  before = Mul(block, length)  token = Add(before, within)
"""
_SCORES = """
  wide = Cast<to = 11>(logits)  divisor = Unsqueeze(temperature, one)  scores = Div(wide, divisor)
  wide_top = Cast<to = 11>(top)  highest = Div(wide_top, divisor)
"""
_WEIGHTS = """
  apart = Sub(scores, highest)  weights = Exp(apart)
"""
_AMONG = """
  sorted, order = TopK<axis = 1>(scores, all)
  before_k = Sub(top_k, one)  place = Unsqueeze(before_k, one)  least = GatherElements<axis = 1>(sorted, place)
  low = Less(sorted, least)  likely = Where(low, never, sorted)
  apart = Sub(likely, highest)  shares = Exp(apart)
  flat_a = Pad(shares, padding)  blocks_a = Reshape(flat_a, split)
  inner_a = CumSum(blocks_a, two)  ends_a = Slice(inner_a, last, end, two)
  before_a = CumSum<exclusive = 1>(ends_a, one)  all_a = Add(inner_a, before_a)  sums_a = Reshape(all_a, of_row)
  whole_a = Slice(sums_a, none, size, one)  so_far = Sub(whole_a, shares)
  total_a = Slice(sums_a, last, end, one)  share = Unsqueeze(top_p, one)  limit = Mul(total_a, share)
  out = GreaterOrEqual(so_far, limit)  picked = Where(out, nothing, shares)
  weights = ScatterElements<axis = 1>(scores, order, picked)
"""
_DRAW = """
  padded = Pad(weights, padding)  blocks_d = Reshape(padded, split)
  inner_d = CumSum(blocks_d, two)  ends = Slice(inner_d, last, end, two)
  before_d = CumSum<exclusive = 1>(ends, one)  all_sums = Add(inner_d, before_d)  sums = Reshape(all_sums, of_row)
  total = Slice(sums, last, end, one)  drawn = Unsqueeze(chance, one)  target = Mul(total, drawn)
  passed = LessOrEqual(sums, target)  each = Cast<to = 11>(passed)
  count = MatMul(each, ones_wide)  token = Cast<to = 7>(count)
"""


def file_for(samplings: Sequence[sampling.Sampling | None]) -> str:
    """The file of the graph that chooses the tokens of such rows."""
    return f"{sampling.kind_of(samplings)}.onnx"


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
    drawing = "double[batch] temperature, double[batch] chance"
    bodies = {
        GREEDY: ("", _FIRST + _GREEDY),
        DRAW: (drawing, _FIRST + _SCORES + _WEIGHTS + _DRAW),
        AMONG: (f"{drawing}, int64[batch] top_k, double[batch] top_p", _FIRST + _SCORES + _AMONG + _DRAW),
    }
    constants = _constants(vocabulary, np.dtype(dtype))
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


def _constants(vocabulary: int, dtype: np.dtype[Any]) -> dict[str, np.ndarray]:
    blocks = -(-vocabulary // _BLOCK)
    whole = blocks * _BLOCK
    long = {
        "one": [1], "two": [2], "none": [0], "last": [-1], "end": [np.iinfo(np.int64).max], "length": [_BLOCK],
        "size": [vocabulary], "all": [vocabulary], "padding": [0, 0, 0, whole - vocabulary],
        "of_block": [-1, _BLOCK], "of_blocks": [-1, blocks], "split": [-1, blocks, _BLOCK], "of_row": [-1, whole],
    }  # fmt: skip
    return {
        **{name: np.array(value, np.int64) for name, value in long.items()},
        "lowest": np.array(-np.inf, dtype),
        "most": np.array(np.inf, dtype),
        "never": np.array(-np.inf),
        "nothing": np.array(0.0),
        "ones_wide": np.ones((whole, 1)),
    }
