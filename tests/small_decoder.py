"""A decoder of one layer as a graph, written in milliseconds; and what it computes, in NumPy and without a cache.

h = embedding[ids] + place[positions]        logits = (h + softmax(q k^T / 2 + causal mask) v wo) head

`LOOKING_BACK` is the same decoder with the input `back`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser

from enginesmith.compiler.signature import AxisRange, Signature, TensorSpec
from enginesmith.compiler.storage.files import hashes
from enginesmith.targets.base import EngineInfo

HEADS, WIDTH, ROOM, VOCABULARY, BATCH = 2, 8, 16, 11, 4
WIDE = HEADS * WIDTH
GRAPH = f"""
<ir_version: 8, opset_import: ["": 17]>
decoder (int64[batch, time] ids, int64[batch] past, int64[batch] count,
         float[batch, {HEADS}, {ROOM}, {WIDTH}] key, float[batch, {HEADS}, {ROOM}, {WIDTH}] value)
    => (float[batch, {VOCABULARY}] logits, float[batch, {HEADS}, {ROOM}, {WIDTH}] key_out,
        float[batch, {HEADS}, {ROOM}, {WIDTH}] value_out)
<int64 zero = {{0}}, int64 one = {{1}}, int64[1] axis1 = {{1}}, int64[2] axes13 = {{1, 3}}, int64[2] axes12 = {{1, 2}},
 int64[4] split = {{0, 0, {HEADS}, {WIDTH}}}, int64[3] join = {{0, 0, -1}}, float scale = {{0.5}}, float open = {{0}},
 int64[3] wide = {{1, 1, {WIDE}}}>
{{
  shape = Shape(ids)  length = Gather<axis = 0>(shape, one)  steps = Range(zero, length, one)
  first = Unsqueeze(past, axis1)  positions = Add(first, steps)
  token = Gather(embedding, ids)  where = Gather(place, positions)  h = Add(token, where)
  q0 = MatMul(h, wq)  q1 = Reshape(q0, split)  q = Transpose<perm = [0, 2, 1, 3]>(q1)
  k0 = MatMul(h, wk)  k1 = Reshape(k0, split)  k = Transpose<perm = [0, 2, 1, 3]>(k1)
  v0 = MatMul(h, wv)  v1 = Reshape(v0, split)  v = Transpose<perm = [0, 2, 1, 3]>(v1)
  spread = Unsqueeze(positions, axes13)  kshape = Shape(k)  index = Expand(spread, kshape)
  key_out = ScatterElements<axis = 2>(key, index, k)
  value_out = ScatterElements<axis = 2>(value, index, v)
  kt = Transpose<perm = [0, 1, 3, 2]>(key_out)  products = MatMul(q, kt)  scores = Mul(products, scale)
  seen = LessOrEqual(slots, spread)  mask = Where(seen, open, never)  masked = Add(scores, mask)
  [softmax] weights = Softmax<axis = -1>(masked)  sums = MatMul(weights, value_out)
  turned = Transpose<perm = [0, 2, 1, 3]>(sums)  joined = Reshape(turned, join)  out = MatMul(joined, wo)
  y = Add(h, out)  last = Sub(count, one)  at = Unsqueeze(last, axes12)
  rows = Expand(at, wide)  state = GatherElements<axis = 1>(y, rows)  flat = Squeeze(state, axis1)
  logits = MatMul(flat, head)
}}
"""


_LAST = GRAPH[GRAPH.index("at = Unsqueeze") : GRAPH.rindex("\n}")]
_KEPT = """at = Unsqueeze(last, axis1)
  before = Sub(at, back)  place_of = Clip(before, zero)  spread_out = Unsqueeze(place_of, axis2)
  rows = Expand(spread_out, wide)  states = GatherElements<axis = 1>(y, rows)
  logits = MatMul(states, head)"""
LOOKING_BACK = (
    GRAPH.replace(_LAST, _KEPT)
    .replace("int64[batch] count,", "int64[batch] count, int64[kept] back,")
    .replace(f"float[batch, {VOCABULARY}] logits", f"float[batch, kept, {VOCABULARY}] logits")
    .replace("int64[1] axis1 = {1},", "int64[1] axis1 = {1}, int64[1] axis2 = {2},")
)


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Of the network, by name."""
    generator = np.random.default_rng(seed)
    shapes = {"embedding": (VOCABULARY, WIDE), "place": (ROOM, WIDE), "head": (WIDE, VOCABULARY)}
    shapes |= dict.fromkeys(("wq", "wk", "wv", "wo"), (WIDE, WIDE))
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def model(text: str = GRAPH, seed: int = 0) -> onnx.ModelProto:
    """The graph with its weights."""
    made = onnx.parser.parse_model(text)
    constants = {**weights(seed), "slots": np.arange(ROOM), "never": np.array(-np.inf, np.float32)}
    made.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in constants.items())
    return made


def spoilt() -> onnx.ModelProto:
    """The same, but one token's logits are no numbers."""
    made = model()
    (head,) = (tensor for tensor in made.graph.initializer if tensor.name == "head")
    array = np.array(onnx.numpy_helper.to_array(head))
    array[:, 7] = np.nan
    head.CopyFrom(onnx.numpy_helper.from_array(array, "head"))
    return made


def signature(drafted: int = 0) -> Signature:
    """What it takes and gives; with drafts of so many tokens, what that of `LOOKING_BACK` does."""
    caches = [TensorSpec(name, "float32", ("batch", HEADS, ROOM, WIDTH)) for name in ("key", "value")]
    numbers = [TensorSpec(name, "int64", ("batch",)) for name in ("past", "count")]
    kept = {"kept": AxisRange(1, 1, drafted + 1)} if drafted else {}
    back = [TensorSpec("back", "int64", (axis,)) for axis in kept]
    return Signature(
        inputs=(TensorSpec("ids", "int64", ("batch", "time")), *numbers, *back, *caches),
        outputs=(
            TensorSpec("logits", "float32", ("batch", *kept, VOCABULARY)),
            *(dataclasses.replace(cache, name=f"{cache.name}_out") for cache in caches),
        ),
        axes={"batch": AxisRange(1, 1, BATCH), "time": AxisRange(1, 1, ROOM), **kept},
        structure={"dict": {name: name for name in ("logits", "key_out", "value_out")}},
        states={"key": "key_out", "value": "value_out"},
    )


def logits_after(tokens: list[int]) -> np.ndarray:
    """The logits that follow a whole text."""
    w = weights()
    h = w["embedding"][tokens] + w["place"][: len(tokens)]
    q, k, v = (np.moveaxis((h @ w[name]).reshape(-1, HEADS, WIDTH), 0, 1) for name in ("wq", "wk", "wv"))
    scores = q @ np.swapaxes(k, 1, 2) / 2
    scores[:, ~np.tri(len(tokens), dtype=bool)] = -np.inf
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = powers / powers.sum(axis=-1, keepdims=True) @ v
    y = h + np.moveaxis(mixed, 0, 1).reshape(len(tokens), WIDE) @ w["wo"]
    return np.asarray(y[-1] @ w["head"])


def greedy(prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens that follow."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits_after(tokens).argmax()))
    return tokens[len(prompt) :]


def write_reference(folder: Path, drafted: int = 0) -> None:
    """A recorded prompt, and the logits that follow; with drafts, those that follow each of its last tokens."""
    prompt, room = [3, 1, 4], (1, HEADS, ROOM, WIDTH)
    inputs = {"ids": np.array([prompt]), "past": np.zeros(1, np.int64), "count": np.array([len(prompt)])}
    inputs |= {name: np.zeros(room, np.float32) for name in ("key", "value")}
    logits = logits_after(prompt)
    if drafted:
        inputs["back"] = np.array([1, 0])
        logits = np.stack([logits_after(prompt[:-1]), logits])
    folder.mkdir()
    for name, arrays in (("inputs", inputs), ("outputs", {"logits": logits[None].astype(np.float32)})):
        np.savez(folder / f"{name}.npz", **{f"0/{key}": array for key, array in arrays.items()})


def write_bundle(folder: Path, made: onnx.ModelProto | None = None, drafted: int = 0, **changes: object) -> Path:
    """A bundle of one engine, which checks drafts of so many tokens; `changes` are fields of its description."""
    directory = folder / "engines" / "decoder"
    directory.mkdir(parents=True)
    onnx.save(made or model(LOOKING_BACK if drafted else GRAPH), directory / "model.onnx")
    info = EngineInfo(
        "decoder", "onnxruntime-cpu", "fp32", "model.onnx", signature(drafted),
        options={"threads": 1}, details={"in_place": True},
    )  # fmt: skip
    dataclasses.replace(info, **changes).write(directory)  # type: ignore[arg-type]
    record = {
        "name": "decoder", "target": "onnxruntime-cpu", "status": "ready", "reason": "", "to_do": "",
        "validation": {"passed": True, "tolerance": {"relative_l2": 1e-3}, "outputs": []},
    }  # fmt: skip
    write_reference(folder / "reference", drafted)
    manifest = {
        "format": 1, "engines": [record], "benchmark": None, "signature": signature(drafted).to_json(),
        "files": hashes(folder),
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder
