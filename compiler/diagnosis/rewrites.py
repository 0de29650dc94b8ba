"""Actions that change the graph: what other precisions, alignment, pruning and sparsity would save by the roofline.

                    operations   weights           other tensors      rate
fp16, bf16          same         half              half               of that precision
int8, fp8           same         a quarter         a quarter (Conv)   of 8 bits; Conv, MatMul and Gemm with weights
int8-dynamic        same         a quarter         5/4                of 8 bits; MatMul, Gemm and LSTM
int8-, int4-weights same         1/4, 1/8, scales  same               same
alignment           grown        grown             same               of aligned products, in place of unaligned ones
pruning to a share  the share    the share         its square root    same
2:4                 same         1/2 + indices     same               twice the dense one

Parts are of fp32; from another precision, the quotient. MatMul and Gemm read and write floats around 8 bits, which
costs about what the narrower product saves. Pruning to a share of multiply-adds leaves the square root of it of each
dimension.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from ...targets import COMPOSED, TARGETS, parse_target
from ...targets.base import Target
from ..alignment.plan import make_plan, products_by_dim
from ..graph.work import Work, is_weighted
from ..ladder.rungs import PRUNED_SHARE
from ..manifest import Action
from ..sparsity.pattern import GROUP
from ..variants import builds
from .bounds import Measured
from .situation import Situation, action, operators

BITS = {"fp64": 64, "fp32": 32, "fp16": 16, "bf16": 16, "int8": 8, "fp8": 8}
HALF = ("fp16", "bf16")
NARROW = ("int8", "fp8")
SCALES = 1 / 32
"""What scales add to weights in blocks of 128, in parts of fp32 weights: four bytes a block."""

QUANTIZING = 1.25
"""Tensors around a product that quantizes what it reads while it runs: fp32, and the 8 bits of it again."""

WEIGHTS = {"int8-weights": 8, "int4-weights": 4}
WASTE = 0.1
"""Of the pass `align`: the largest share of multiply-adds that it adds."""

STATIC = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul"))
DYNAMIC = frozenset(("Gemm", "LSTM", "MatMul"))
_BUDGET = "what it costs in accuracy a --budget bounds"


def precisions(situation: Situation) -> Iterator[Action | None]:
    """Other precisions of the own target, and of other targets of the same device that can run here."""
    for target in (situation.target, *_others(situation)):
        own = target is situation.target
        for precision in (*HALF, *NARROW, "int8-dynamic", *WEIGHTS):
            if precision == situation.info.precision or (not own and precision not in (*HALF, *NARROW)):
                continue
            if builds(target, precision) and (own or not builds(situation.target, precision)):
                where = "" if own else f"--target {target.name} "
                yield _lowered(situation, target, precision, f"{where}--precision {precision}")


def _others(situation: Situation) -> list[Target]:
    device = situation.roof.ceilings.device
    found = []
    for name in TARGETS:
        if name == situation.target.name or name in COMPOSED:
            continue
        target = parse_target(name)
        if target.capabilities.devices == (device,) and target.capabilities.consumes == "graph":
            found.append(target)
    return [target for target in found if target.availability().run]


def _lowered(situation: Situation, target: Target, precision: str, text: str) -> Action | None:
    rates = situation.roof.ceilings.gflops
    rate = "int8" if precision == "int8-dynamic" else precision
    if rate not in rates and precision not in WEIGHTS:
        return None
    if precision == "fp16" and target.name == "onnxruntime-cpu":
        return None  # stored in half precision and computed in fp32: nothing is saved
    savings = {
        layer: layer.saved_ms(situation.roof, work)
        for layer in situation.layers
        if layer.work is not None and (work := _in_precision(layer, layer.work, precision)) is not None
    }
    limited = sum(layer.ms for layer in savings if layer.bound in ("compute", "bandwidth"))
    share = f"{limited / situation.total_ms:.0%} of the time is in such layers that compute or bandwidth bounds"
    ratio = (
        ""
        if precision in WEIGHTS
        else f"; {rate} products reach {rates[rate] / rates['fp32']:.1f} times the rate of fp32 here"
    )
    return action(text, f"{share}{ratio}; {_BUDGET}", savings)


def _in_precision(layer: Measured, work: Work, precision: str) -> Work | None:
    """The work of a layer once it is lowered; None where it is not, or has as few bits already."""
    before = BITS.get(work.precision, 32)
    if precision in HALF:
        part = BITS[precision] / before
        return work.scaled(weights=part, moved=part, precision=precision) if part < 1 else None
    if before <= 8 or not any(map(is_weighted, layer.nodes)):
        return None
    if precision in NARROW:
        if not operators(layer) & STATIC:
            return None
        part = 8 / before
        moved = part if "Conv" in operators(layer) else 1.0
        return work.scaled(weights=part, moved=moved, precision=precision)
    if not operators(layer) & DYNAMIC:
        return None
    if precision == "int8-dynamic":
        return work.scaled(weights=8 / before, moved=QUANTIZING, precision="int8")
    return (
        work.scaled(weights=WEIGHTS[precision] / before + SCALES * 32 / before)
        if "LSTM" not in operators(layer)
        else None
    )


def alignment(situation: Situation) -> Iterator[Action | None]:
    """Dimensions grown to what kernels take at once."""
    rates, slow = situation.roof.ceilings.gflops, situation.roof.ceilings.unaligned_gflops
    multiple = situation.target.capabilities.alignment.get(situation.info.precision)
    if multiple is None and not situation.on_gpu:
        multiple = situation.target.capabilities.channels
    dimensions = situation.dimensions
    if multiple is None or dimensions is None or not slow:
        return
    plan = make_plan(dimensions, multiple, WASTE, ())
    products = products_by_dim(dimensions)
    growths: dict[Measured, float] = {}
    for growth in plan.growths:
        for layer in situation.of_nodes(products[growth.group.dim]):
            growths[layer] = growths.get(layer, 1.0) * growth.size / growth.group.size
    savings = {}
    for layer, growth_factor in growths.items():
        if layer.work is None or layer.work.precision not in slow:
            continue
        grown = layer.work.scaled(flops=growth_factor, weights=growth_factor)
        savings[layer] = layer.saved_ms(situation.roof, grown, aligned_before=False)
    lost = {name: slow[name] / rates[name] for name in slow if name in rates}
    rates_text = ", ".join(f"{name} {part:.0%}" for name, part in lost.items())
    sizes = ", ".join(f"{growth.group.size} to {growth.size}" for growth in plan.growths[:4])
    why = f"dimensions grow from {sizes}; unaligned products reach of the aligned rate here: {rates_text}"
    yield action(f"--align {multiple}", why, savings)


def pruning(situation: Situation) -> Iterator[Action | None]:
    """Fewer channels, neurons and heads in products that have some which may go."""
    dimensions = situation.dimensions
    if dimensions is None or not situation.weighted:
        return
    products = products_by_dim(dimensions)
    shrinking = [group for group in dimensions.groups if not group.why_not("shrink")]
    labels = {name for group in shrinking for name in products.get(group.dim, ())}
    share = float(PRUNED_SHARE.partition("=")[2])
    savings = {
        layer: layer.saved_ms(situation.roof, layer.work.scaled(flops=share, weights=share, moved=math.sqrt(share)))
        for layer in situation.of_nodes(labels)
        if layer.work is not None and layer.work.heavy
    }
    why = f"{len(shrinking)} dimensions can shrink; {_BUDGET}, and it needs calibration data"
    yield action(f"--prune {PRUNED_SHARE}", why, savings)


def sparsity(situation: Situation) -> Iterator[Action | None]:
    """2:4 sparse weights, where the target has kernels for them."""
    if "2:4" not in situation.target.capabilities.sparsity:
        return
    savings: dict[Measured, float] = {}
    for layer in situation.weighted:
        work = layer.work
        if work is None or work.weight_bytes == 0 or not operators(layer) & {"Conv", "Gemm", "MatMul"}:
            continue
        weights = 2 / GROUP + 1 / BITS.get(work.precision, 32)
        savings[layer] = layer.saved_ms(situation.roof, work.scaled(flops=0.5, weights=weights))
    why = f"sparse Tensor Cores do twice the operations; measured gains are often below that, and {_BUDGET}"
    yield action("--sparsify 2:4", why, savings)
