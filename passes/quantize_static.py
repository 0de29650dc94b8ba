"""Quantizes weights and activations to 8 bits, with ranges from calibration: QuantizeLinear and DequantizeLinear.

    x -> Conv(W, b) -> y     ->     x -> Q -> DQ -> Conv(DQ(W8), DQ(b32)) -> Q -> DQ -> y

Where Q/DQ goes is the target's, as its engine fuses them into integer kernels: `onnxruntime`, `openvino` and `tensorrt`
in `compiler.quantization`. A graph that is quantized already is kept as it is.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Literal

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ..compiler.budget import Budget
from ..compiler.calibration import Calibration, Statistics
from ..compiler.graph import Graph
from ..compiler.graph.editing import flattened
from ..compiler.graph.selection import label, select
from ..compiler.quantization import onnxruntime, openvino, tensorrt
from ..compiler.quantization.attention import attentions, drop_guards
from ..compiler.quantization.bias import correct
from ..compiler.quantization.equalize import equalize
from ..compiler.quantization.forms import fold_weights, pool_means, prepare
from ..compiler.quantization.parameters import Parameters
from ..compiler.quantization.plan import Plan, Weight, first_layers
from ..compiler.quantization.qdq import Quantized, insert, quantized_nodes
from ..compiler.quantization.ranges import Choice, activation_ranges, unknown
from ..compiler.quantization.rounding import round_weights
from ..compiler.quantization.saturation import saturates
from ..compiler.quantization.smooth import ALPHA, check_alpha, inputs, is_convolutional, smooth
from ..compiler.quantization.tiles import multiplies_tiles, shifted
from ..compiler.quantization.tuning import Trial, settle
from ..compiler.quantization.weights import (
    broken_weights,
    fit_biases,
    quantize_biases,
    round_to_nearest,
    weight_ranges,
    widen_for_biases,
)
from ..compiler.sensitivity.evaluation import Evaluation
from .base import Context, Pass, PassResult, Refusal

TRIED: Mapping[str, tuple[Any, ...]] = {
    "method": ("auto", "minmax", "moving-average"),
    "bias_correction": (True, False),
}
"""Values of the fields that are None, the one to prefer first."""

THIRD_DB = -10 * math.log10(1 - 1 / 3)
"""How much lower the error must be with the first layers float: they make a third of its square."""

BATCHES = 4
"""How many batches the errors of trials are measured on."""

_CPUS = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
_DTYPES = {"int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN}


@dataclasses.dataclass(frozen=True)
class QuantizeStatic(Pass):
    """Quantizes what the target computes in 8 bits; the rest stays float, each node with its reason.

    Attributes:
        scheme: whose placement; tensorrt-8 is for TensorRT 8.6 and 9, which gain nothing from 8 bits around attention.
        dtype: fp8 is for scheme=tensorrt.
        method: how ranges of activations come from their statistics; "auto" is "mse" in convolutional networks, and
            "minmax" for what MatMul and Gemm multiply, see `compiler.quantization.ranges`. None: what of `TRIED` has
            the least error on a few batches of the calibration data.
        per_channel: one scale for each output channel of a weight.
        search: clip each channel of a weight at the least squared error, not at its largest magnitude.
        rounding: "gptq" rounds weights so that layers change least on the data.
        equalize: even out the ranges of channels between two layers first.
        smooth: SmoothQuant's alpha for MatMul and Gemm; 0 leaves it out. None: 0.8 for INT8 where products outnumber
            convolutions, with nodes put in for it on CPUs alone.
        bias_correction: take back the shift that rounding causes in the means of channels. None: as for `method`.
        reduce_range: 7 bits for weights. None: where this processor has no VNNI and its sums would saturate.
        attention: quantize the two products around each softmax as well; for scheme=tensorrt, whose fused kernel of
            attention is in fp16 alone on most versions and GPUs.
        first_float: leave the layers float that no other comes before. None: where outputs are beyond the budget for
            INT8 on those batches, and these layers make a third of the squared error; so it is where the input spans
            more than 8 bits can tell, as sound and its spectra do.
        keep: names or globs of nodes that stay float.
    """

    name: ClassVar[str] = "quantize-static"
    scheme: Literal["onnxruntime", "openvino", "tensorrt", "tensorrt-8"] = "onnxruntime"
    dtype: Literal["int8", "fp8"] = "int8"
    method: Choice | None = None
    per_channel: bool = True
    search: bool = False
    rounding: Literal["nearest", "gptq"] = "nearest"
    equalize: bool = False
    smooth: float | None = None
    bias_correction: bool | None = None
    reduce_range: bool | None = None
    attention: bool = False
    first_float: bool | None = None
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.attention and self.scheme in _CPUS:
            raise ValueError(
                "attention=true needs scheme=tensorrt; on CPUs, products with a constant alone are quantized"
            )
        if self.dtype == "fp8" and self.scheme in _CPUS:
            raise ValueError(f"{_CPUS[self.scheme]} has no FP8 kernels: dtype=fp8 needs scheme=tensorrt")
        check_alpha(self.smooth)

    @property
    def calibrates(self) -> bool:
        """For the ranges of activations."""
        return True

    def apply(self, graph: Graph, context: Context) -> PassResult:
        """Quantizes in place.

        Raises:
            RecipeError: there is no calibration, or `keep` has a pattern that matches no node.
            DataError, GraphError: the data does not run through the graph.
        """
        if (reason := self._why_not(graph)) is not None:
            return PassResult(modified=False, refusals=(reason,))
        calibration = context.require_calibration(self.name, "to see the ranges of activations")
        run = _Run(self, graph, calibration)
        if not run.plan.nodes:
            return PassResult(modified=False, refusals=run.refusals)
        options, trials = self.settled(graph, context)
        if options != self:
            run = _Run(options, graph, calibration)
        details = {**run.rewrite(), "trials": [trial.row() for trial in trials]}
        graph.model = run.graph.model
        return PassResult(modified=True, changes=dict(run.changes), refusals=run.refusals, details=details)

    def settled(self, graph: Graph, context: Context) -> tuple[QuantizeStatic, tuple[Trial, ...]]:
        """These options with what they leave open decided by trials, each with weights rounded to nearest.

        FP8, which ONNX Runtime does not compute in on a CPU, gets the first of `TRIED`. Raises as `apply`.
        """
        tried = {name: values[:1] for name, values in TRIED.items()} if self.dtype == "fp8" else TRIED
        calibration = context.require_calibration(self.name, "to see the ranges of activations")

        @functools.cache
        def evaluation() -> Evaluation:
            return Evaluation(graph, calibration.samples, Budget.default("int8"), batches=BATCHES)

        @functools.cache
        def error(options: QuantizeStatic) -> float:
            work = graph.clone()
            dataclasses.replace(options, first_float=bool(options.first_float)).apply(work, context)
            return evaluation().measure(work).error

        plain, trials = settle(dataclasses.replace(self, rounding="nearest"), tried, error)
        if self.first_float is None and self.dtype == "int8" and error(plain) > Budget.default("int8").bound:
            plain, (_, other) = settle(plain, {"first_float": (False, True)}, error, worth_db=THIRD_DB)
            trials = (*(dataclasses.replace(trial, kept=trial.kept and not other.kept) for trial in trials), other)
        return dataclasses.replace(plain, rounding=self.rounding), trials

    def _why_not(self, graph: Graph) -> Refusal | None:
        """Why the whole graph is left as it is."""
        if found := quantized_nodes(graph):
            return Refusal(f"the graph is quantized already ({len(found)} such nodes), and is kept", label(found[0]))
        needed = 19 if self.dtype == "fp8" else 13 if self.per_channel else 10
        if graph.opset < needed:
            what = {19: "FP8", 13: "one scale for each channel", 10: "QuantizeLinear"}[needed]
            hint = ", or choose per_channel=false" if needed == 13 else ""
            return Refusal(f"{what} needs opset {needed}, the graph has {graph.opset}: export for a newer one{hint}")
        return None


class _Run:
    """One graph on its way: forms and repairs in float first, then the plan, then the rewrite."""

    def __init__(self, options: QuantizeStatic, graph: Graph, calibration: Calibration) -> None:
        self.options = options
        self.changes: Counter[str] = Counter()
        self.graph = folded(graph)
        self._calibration = calibration
        self._repairs: list[Refusal] = []
        asked = select(self.graph, options.keep)
        self._prepare(asked)
        self._keep = {n: f"kept by choice: {asked[label(n)]!r}" for n in self.graph.nodes() if label(n) in asked}
        self.plan = self._plan()
        if options.first_float:
            reason = "first_float leaves the first layers float"
            self._keep.update(dict.fromkeys(first_layers(self.graph.model.graph, self.plan), reason))
            self.plan = self._plan()
        if not self.plan.nodes:
            return  # nothing to observe
        self.statistics = self._observe()
        while missing := unknown(self.graph, self.plan, self.statistics):
            self._keep.update(missing)
            self.plan = self._plan()
            self.statistics = self._observe()

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """Nodes that stay float, then repairs that were not possible."""
        return (*self.plan.refusals, *self._repairs)

    def rewrite(self) -> dict[str, Any]:
        """Puts Q/DQ in; returns the details of the result."""
        options = self.options
        activations, table = activation_ranges(self.plan, self.statistics, options.method or "auto")
        ranges = weight_ranges(self.plan.weights, search=options.search, reduce_range=self._reduced())
        ranges = fit_biases(self.plan, ranges, activations)
        weights = self._round(ranges)
        uncorrected: list[Refusal] = []
        if options.bias_correction:
            corrected, uncorrected = correct(self.graph, weights, self.statistics)
            self.changes.update(corrected)
            self.plan = self._plan()  # layers without a bias have one now
            weights = widen_for_biases(self.plan, weights, activations)
        stored = {weight: found.parameters for weight, found in weights.items()}
        biases = quantize_biases(self.plan, stored, activations)
        if options.scheme == "onnxruntime" and multiplies_tiles():
            weights = shifted(weights)
        self.changes.update(insert(self.graph, self.plan, activations, weights, biases))
        limits = {limit.name: (limit.low, limit.high) for limit in table}
        return {
            "method": options.method,
            "samples": self.statistics.samples,
            "statistics": self.statistics.digest,
            "limits": [limit.row() for limit in table],
            "biases not corrected": {refusal.node: refusal.reason for refusal in uncorrected},
            "findings": [dataclasses.asdict(finding) for finding in self.statistics.findings(limits)],
        }

    def _prepare(self, asked: Collection[str]) -> None:
        if self.options.scheme == "onnxruntime":
            self.changes.update(prepare(self.graph, asked))
        else:
            self.changes.update(pool_means(self.graph, asked))
            if guards := drop_guards(self.graph):
                self.changes["guards dropped"] = guards
        if self.options.equalize:
            self._note(*equalize(self.graph))
        self._smooth()
        self.graph.infer()

    def _smooth(self) -> None:
        asked = self.options.smooth
        if asked == 0 or (asked is None and (self.options.dtype == "fp8" or is_convolutional(self.graph))):
            return
        if self.options.scheme == "tensorrt-8" and any(attentions(self.graph.model.graph)):
            return  # what it would smooth stays float
        insert = asked is not None or self.options.scheme in _CPUS
        statistics = self._calibration.statistics(self.graph, inputs(self.graph))
        changes, refusals = smooth(self.graph, statistics, ALPHA if asked is None else asked, insert=insert)
        self._note(changes, refusals if asked else [])

    def _plan(self) -> Plan:
        keep = {**self._keep, **broken_weights(self.graph)}
        options = self.options
        if options.scheme in _CPUS:
            make = onnxruntime.plan if options.scheme == "onnxruntime" else openvino.plan
            return make(self.graph, per_channel=options.per_channel, keep=keep)
        dtype, attention = _DTYPES[options.dtype], options.attention
        return tensorrt.plan(
            self.graph,
            dtype=dtype,
            per_channel=options.per_channel,
            attention=attention,
            regions=options.scheme != "tensorrt-8",
            keep=keep,
        )

    def _observe(self) -> Statistics:
        return self._calibration.statistics(self.graph, sorted(self.plan.activations))

    def _round(self, ranges: Mapping[Weight, Parameters]) -> dict[Weight, Quantized]:
        if self.options.rounding == "nearest":
            return round_to_nearest(ranges)
        weights, refusals = round_weights(self.graph, ranges, self._calibration.limited())
        self._repairs.extend(refusals)
        return weights

    def _note(self, changes: Mapping[str, int], refusals: list[Refusal]) -> None:
        self.changes.update(changes)
        self._repairs.extend(refusals)

    def _reduced(self) -> bool:
        asked = self.options.reduce_range
        return self.options.scheme in _CPUS and saturates() if asked is None else asked


def folded(graph: Graph) -> Graph:
    """A flat copy in which weights that nodes compute from constants are initializers too."""
    work = flattened(graph)
    if fold_weights(work):
        RemoveUnusedNodesPass()(work.model)
    return work
