from __future__ import annotations

import ast
import html.parser
import math
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enginesmith.compiler.manifest import Manifest, Stage
from enginesmith.compiler.report import figures, numbers, render, view, write_report
from enginesmith.compiler.report.facts import Fact, facts
from enginesmith.compiler.signature import Signature, TensorSpec

example: Callable[[], Manifest] = runpy.run_path(str(Path(__file__).with_name("manifest_example.py")))["example"]
SECTIONS = ["model", "speed", "accuracy", "trade-off", "precision", "stages", "passes", "capture", "engines", "missing"]
SECTIONS += ["environment", "protocol", "use"]
BEST = "onnxruntime-cpu-fp32"


class Page(html.parser.HTMLParser):
    """Text, ids and tags of a page; fails on tags that do not nest and on tables whose rows differ in columns."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.columns: list[set[int]] = []
        self.parts: list[str] = []
        self.row = 0
        self.feed(text)
        self.close()
        assert self.open == []
        assert all(len(widths) == 1 for widths in self.columns), self.columns

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag in ("td", "th", "dt", "dd", "pre", "summary"):
            self.parts.append(" ")
        if tag == "table":
            self.columns.append(set())
        if tag == "tr":
            self.row = 0
        if tag in ("td", "th"):
            self.row += int(dict(attrs).get("colspan") or 1)
        if tag == "th":
            assert dict(attrs).get("scope") in ("col", "row", "rowgroup")
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"
        if tag == "tr":
            self.columns[-1].add(self.row)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.parts.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.parts).split())


def page(manifest: Manifest) -> Page:
    return Page(render(manifest))


def timing_of(manifest: Manifest, name: str) -> Any:
    return next(timing for timing in view.optimum(manifest) if timing["candidate"] == name)


def engine_of(manifest: Manifest, name: str) -> Any:
    return next(engine for engine in manifest["engines"] if engine["name"] == name)


def test_sections_in_order() -> None:
    assert page(example()).ids == SECTIONS


def test_every_link_inside_the_page_has_its_place() -> None:
    found = page(example())
    assert {value[1:] for name, value in found.attributes if name == "href"} <= set(found.ids)


def test_verdict_names_the_engine_the_speed_up_its_interval_and_the_batch() -> None:
    text = page(example()).text
    assert f"PASS {BEST} runs 3.41 times as fast as torch-eager at batch 8" in text
    assert "The 95 % interval of the speed-up is 3.29× to 3.55×." in text  # noqa: RUF001
    assert (
        "2 of 3 engines that ran agree with the reference, 1 built but not run, 1 unavailable here, 1 failed." in text
    )


@pytest.mark.parametrize(
    "verdict",
    [
        {},
        {"passed": None, "state": "passed"},
        {"passed": "yes", "state": "passed"},
        {"passed": False, "state": "passed"},
        {"passed": False, "state": "unproven"},
        {"passed": True},
        {"passed": True, "state": None},
        {"passed": True, "state": "failed"},
        {"passed": True, "state": "PASS"},
    ],
)
def test_verdict_is_fail_unless_it_says_passed(verdict: dict[str, Any]) -> None:
    text = page({**example(), "verdict": verdict}).text
    assert f"FAIL onnxruntime-cpu-fp16 failed validation Even so, {BEST} runs" in text
    assert not re.search("PASS|BUILT", text)


def test_reasons_of_a_failure_are_all_told() -> None:
    text = page({**example(), "verdict": {"passed": False, "reasons": ["goal missed\n  by 2 ms", "too slow"]}}).text
    assert "FAIL goal missed too slow" in text


@pytest.mark.parametrize(
    ("speed_up", "sentence"),
    [
        ({"ratio": 12.34, "low": 12.0, "high": 12.9}, "runs 12.3 times as fast as torch-eager at batch 8"),
        ({"ratio": 0.81, "low": 0.8, "high": 0.82}, "runs 0.81 times the speed of torch-eager at batch 8"),
        ({"ratio": 1.01, "low": 0.98, "high": 1.03}, "is as fast as torch-eager at batch 8, within the error"),
        ({"ratio": math.nan, "low": math.nan, "high": math.nan}, "takes 0.375 ms at batch 8"),
        (None, "takes 0.375 ms at batch 8"),
    ],
)
def test_sentence_of_the_speed_up(speed_up: dict[str, Any] | None, sentence: str) -> None:
    manifest = example()
    timing_of(manifest, BEST)["speed_up"] = ({"against": "torch-eager"} | speed_up) if speed_up else None
    assert f"{BEST} {sentence}" in page(manifest).text


def test_best_engine_is_the_fastest_valid_one_where_the_verdict_names_none() -> None:
    manifest = example()
    manifest["verdict"] = {"passed": True, "state": "passed"}
    timing_of(manifest, "onnxruntime-cpu-fp16")["p50_ms"] = 0.001  # fastest, but wrong
    timing_of(manifest, "torchscript-fp32")["p50_ms"] = math.nan
    assert view.best_engine(manifest) == BEST


def test_text_of_the_manifest_is_escaped_everywhere() -> None:
    def poison(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: poison(item) for key, item in value.items()}
        if isinstance(value, list):
            return [poison(item) for item in value]
        return f"{value}<script>alert(1)</script>\"'><img src=x>" if isinstance(value, str) else value

    manifest = poison(example())
    for engine, clean in zip(manifest["engines"], example()["engines"], strict=True):
        engine["status"] = clean["status"]
        engine["details"] = {"<script>": {"<script>": ["<script>" * 30, "<b>"]}, **engine["details"]}
    manifest["benchmark"]["skipped"]["<script>"] = "<script>" * 40
    text = render(manifest)
    assert "<script" not in text
    assert "<img" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert not {"script", "img", "b"} & Page(text).tags


def test_page_is_self_contained() -> None:
    text = render(example())
    assert not re.search(r"\bsrc=|url\(|@import|https?://|<script|<link|href=\"[^#]", text)
    assert "default-src 'none'" in text


@pytest.mark.parametrize("random", [True, False])
def test_random_data_is_said_in_a_banner(random: bool) -> None:
    manifest = example()
    manifest["data"]["random"] = random
    manifest["calibration"] = []
    found = page(manifest)
    assert (("class", "banner") in found.attributes) == random
    assert ("Random inputs." in found.text) == random
    assert ("Inputs were random." in found.text) == random


def test_a_dropped_engine_says_why_and_is_not_counted_among_the_wrong() -> None:
    manifest = example()
    manifest["verdict"] |= {"best": None}
    assert "onnxruntime-cpu-fp16" in view.wrong_engines(manifest["engines"])
    for name in ("onnxruntime-cpu-fp16", BEST):
        engine_of(manifest, name)["dropped"] = "it is not faster than <b>another</b>"
    text = page(manifest).text
    assert "Dropped: it is not faster than <b>another</b>." in text
    assert "2 dropped." in text
    assert view.wrong_engines(manifest["engines"]) == ()
    assert view.best_engine(manifest) == "torchscript-fp32"


def test_layers_made_sparse_are_listed_and_so_are_those_that_run_sparse() -> None:
    manifest = example()
    row = {"layer": "conv<1>", "operator": "Conv", "method": "sparsegpt", "outputs": 32, "inputs": 16, "zeroed": 2304}
    row |= {"weight_error": 0.31, "output_error": 0.052}
    manifest["passes"][0] |= {"text": "sparsify", "details": {"sparse": [row, {**row, "output_error": None}]}}
    sparse = {"eligible": ["conv<1> + relu", "head"], "picked": [], "source": "log of the build"}
    engine_of(manifest, "tensorrt-rtx-fp16")["details"] = {"sparse": sparse}
    text = page(manifest).text
    assert "2 layers made sparse by sparsify" in text
    assert f"conv<1> sparsegpt 32 16 2,304 {numbers.error(0.31)} {numbers.error(0.052)}" in text
    assert f"{numbers.error(0.31)} {numbers.ABSENT}" in text
    assert "2:4 sparse layers eligible conv<1> + relu, head picked none source log of the build" in text


def test_layers_that_attend_sparsely_are_listed_with_what_each_changes() -> None:
    manifest = example()
    row = {"layer": "attention<1>", "kind": "window of 64", "chosen": True, "error": 0.004, "change": -0.002}
    row |= {"relative_l2": 0.03, "tokens": 64}
    other = {**row, "kind": "top 32", "chosen": False}
    details = {"sparse_attention": [row, other], "budget": 0.01, "data": "texts.npz", "calls": 64}
    manifest["passes"][0] |= {"text": "sparse-attention", "details": {**details, "together": {**row, "error": 0.005}}}
    text = page(manifest).text
    assert "1 of 1 layers made to attend sparsely by sparse-attention" in text
    assert f"on texts.npz; together they change {numbers.error(0.005)}, and {numbers.error(0.01)} is allowed" in text
    assert f"attention<1> window of 64 yes {numbers.error(0.004)} {numbers.error(-0.002)} 64" in text
    assert f"attention<1> top 32 no {numbers.error(0.004)}" in text


def test_dimensions_that_were_grown_are_listed() -> None:
    manifest = example()
    row = {"group": "up<1>", "before": 1001, "after": 1008, "macs_before": 2522520, "macs_after": 2540160}
    details = {"aligned": [row], "aligned_share": {"before": 0.25, "after": 1.0}}
    manifest["passes"][0] |= {"text": "align", "details": details}
    text = page(manifest).text
    assert "1 dimension grown by align, 25 % of multiply-adds aligned before and 100 % after" in text
    assert "up<1> 1,001 1,008 2,522,520 2,540,160" in text


def empty() -> Manifest:
    nothing: Any = {"verdict": {"passed": False}, "signature": {}, "data": {}, "stages": [], "passes": []}
    nothing |= {"calibration": [], "engines": [], "benchmark": None, "environment": {}, "source": {}}
    nothing |= {"capture": {"exporter": None, "opset": None, "attempts": [], "checks": []}}
    return {**example(), **nothing}


def test_empty_manifest_says_what_is_missing() -> None:
    text = page(empty()).text
    assert "FAIL no engine was proven right" in text
    for said in ("Nothing was measured.", "No engine was validated.", "No pass ran.", "Nothing was captured."):
        assert said in text
    assert "No engine was built." in text
    assert "None" not in text


def test_failed_capture_shows_each_exporter_with_its_reason() -> None:
    manifest = empty()
    manifest["capture"] = example()["capture"]
    manifest["capture"] |= {"exporter": None, "checks": []}
    manifest["capture"]["attempts"][1] |= {"succeeded": False, "reason": "no TorchScript either"}
    text = page(manifest).text
    assert "FAIL the model could not be captured" in text
    assert "No exporter could capture the model." in text
    assert "dynamo exporter failed 4.31 s torch.export failed in DigitsNet.forward" in text
    assert "hint: use torch._check" in text
    assert "no TorchScript either" in text


def test_without_benchmark_accuracy_is_still_told() -> None:
    text = page({**example(), "benchmark": None}).text
    assert f"PASS {BEST} gives the right results; its speed was not measured" in text
    assert "Nothing was measured." in text
    assert "How it was measured" not in text


def test_only_built_engines() -> None:
    manifest: Manifest = {**example(), "verdict": {"passed": True, "state": "unproven"}, "benchmark": None}
    manifest["engines"] = [engine_of(example(), "tensorrt-rtx-fp16")]
    text = page(manifest).text
    assert "BUILT no engine ran on this machine, so none was compared with the reference 1 built but not run." in text
    assert 'class="verdict unproven"' in render(manifest)
    assert "tensorrt-rtx-fp16 built no NVIDIA GPU here" in text


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_numbers_that_do_not_exist(bad: float | None) -> None:
    manifest: Any = example()
    for timing in manifest["benchmark"]["timings"]:
        for field in ("mean_ms", "p50_ms", "p99_ms", "samples_per_s", "requests_per_s", "gpu_utilization_percent"):
            timing[field] = bad
        if timing["speed_up"]:
            timing["speed_up"] |= dict.fromkeys(("ratio", "low", "high"), math.nan if bad is None else bad)
    for metrics in engine_of(manifest, BEST)["validation"]["outputs"]:
        metrics |= dict.fromkeys(("relative_l2", "max_abs", "cosine", "snr_db", "top1", "top5"), bad)
    engine_of(manifest, BEST)["build_s"] = bad
    manifest["stages"][0]["seconds"] = bad
    manifest["capture"]["checks"][0]["relative_l2"] = bad
    text = render(manifest)
    assert not re.search(r"\bnan\b|\binf\b|None", Page(text).text)
    assert not re.search(r'="(nan|inf)', text)


def test_one_nan_among_good_outputs_is_not_hidden_by_the_largest_error() -> None:
    manifest = example()
    engine_of(manifest, BEST)["validation"]["outputs"][1]["relative_l2"] = math.nan
    figure = next(figure for figure in view.headline(manifest).figures if figure.label == "Relative error")
    assert figure.value == "—"


def test_failures_are_told_in_words() -> None:
    text = page(example()).text
    assert "logits: relative L2 is 6.1e-4, allowed is 1e-4; worst at sample 217" in text
    assert "onnxruntime-cpu-fp16 failed 360 samples, noise floor of onnxruntime-cpu-fp32" in text
    assert "1.50 ms · failed validation" in text
    assert "accuracy 0.9861 0.9722 to 0.9972 0.9861 360" in text


def test_perplexity_is_told_beside_its_metric() -> None:
    manifest = example()
    metric = engine_of(manifest, BEST)["validation"]["metric"]
    metric |= {"name": "log_likelihood", "perplexity": 44.1237, "perplexity_of_reference": 44.12}
    assert "log_likelihood: perplexity 44.124, reference 44.12" in page(manifest).text


def test_engines_that_did_not_run_say_why_and_what_to_do() -> None:
    text = page(example()).text
    assert "tensorrt-fp16 failed the TensorRT worker ended by signal 11 (SIGSEGV) after 38 s" in text
    assert "onnxruntime-cuda-fp16 unavailable onnxruntime 1.32 here has no CUDAExecutionProvider" in text
    assert "To do: pip uninstall onnxruntime, then pip install 'enginesmith[cuda]'" in text
    assert "torch-compile no C++ compiler was found" in text


def test_gpu_columns_appear_only_where_something_was_measured() -> None:
    manifest = example()
    assert "GPU use" not in page(manifest).text
    timing_of(manifest, BEST).update(gpu_utilization_percent=87.44, gpu_memory_bytes=1_300_000_000, device_p50_ms=0.31)
    text = page(manifest).text
    assert "Device p50, ms" in text
    assert "87.44 % 1.30 GB" in text
    assert "SM clock" not in text


def test_many_refusals_are_folded_and_few_are_open() -> None:
    text = render(example())
    assert "<details><summary>9 places left alone" in text
    assert "<details open><summary>2 places left alone" in text
    assert view.refusals_by_reason([{"reason": "a", "node": "x"}, {"reason": "b"}, {"reason": "a", "node": "y"}]) == {
        "a": ["x", "y"],
        "b": [],
    }


def test_variants_keep_the_order_in_which_they_ran() -> None:
    assert list(view.passes_by_variant(example()["passes"])) == ["fp32", "fp16", "mixed", "int8"]


def test_a_choice_of_precisions_is_drawn_and_told() -> None:
    found = page(example())
    assert "mixed: what stays in full precision" in found.text
    assert "The budget is relative_l2=0.02: 4 % of the model" in found.text
    assert "multiply-adds stay, with a relative error of 0.0180." in found.text
    assert [value for name, value in found.attributes if (name, value) == ("class", "chosen")] == ["chosen"]
    assert len([value for name, value in found.attributes if name == "class" and value in ("holds", "over")]) == 5
    assert "<b>relu_2" in found.text
    assert "method=auto,bias_correction=true 30.1 kept method=minmax,bias_correction=true —" in found.text
    assert "1 tensor is clipped in more than 0.1 % of the values." in found.text


def test_curves_reach_from_the_lowest_to_the_highest_power_of_ten() -> None:
    points = [
        {"cost": 0.0, "error": None, "nodes": 0, "holds": False},
        {"cost": 0.5, "error": 0.02, "nodes": 3, "holds": True},
        {"cost": 1.0, "error": 0.0, "nodes": 9, "holds": True},
    ]
    chart = figures.curve_chart(points, points[1])
    assert [line.label for line in chart.grid] == ["0.0100", "0.100"]
    top, bottom = chart.grid[1].y, chart.grid[0].y
    assert [(point.x, point.holds) for point in chart.points] == [(1.0, False), (50.0, True), (99.0, True)]
    assert chart.points[0].y == top < chart.points[1].y < bottom == chart.points[2].y
    assert chart.chosen == chart.points[1]


def test_calibration_and_what_it_found() -> None:
    found = page(example())
    assert "9 tensors were measured over 256 samples of images.npz" in found.text
    assert "image has one sample to calibrate on" in found.text
    assert "relu_3 has 2 dead channels of 32" in found.text


def test_a_budget_that_does_not_hold_is_told() -> None:
    manifest = example()
    validation = manifest["engines"][0]["validation"]
    assert validation
    validation["budget"] = {"text": "top1=0.99", "value": 0.5, "holds": False, "problem": ""}
    assert "Budget top1=0.99: measured 0.500 exceeded" in page(manifest).text


def test_notes_stand_below_the_verdict() -> None:
    manifest = example()
    manifest["verdict"]["notes"] = ["a-int8 is slower than a-fp32: 1.20 times its time"]
    assert "a-int8 is slower than a-fp32: 1.20 times its time" in page(manifest).text


def test_sizes_are_in_order_and_the_optimum_is_marked() -> None:
    manifest = example()
    assert manifest["benchmark"]
    manifest["benchmark"]["timings"].reverse()
    assert [(group.title, group.optimum) for group in view.groups(manifest)] == [
        ("batch 1", False),
        ("batch 8", True),
        ("batch 64", False),
    ]


def test_first_size_stands_in_where_the_optimum_was_not_measured() -> None:
    manifest = example()
    assert manifest["benchmark"]
    manifest["benchmark"]["timings"] = [t for t in manifest["benchmark"]["timings"] if t["batch"] != 8]
    assert {timing["batch"] for timing in view.optimum(manifest)} == {1}


def test_speed_chart_is_on_one_scale() -> None:
    chart = figures.speed_chart(
        view.optimum(example()), baseline="torch-eager", best=BEST, wrong=["onnxruntime-cpu-fp16"], caption="speed"
    )
    assert [(bar.label, bar.tone) for bar in chart.bars] == [
        ("torch-eager", "baseline"),
        (BEST, "best"),
        ("torchscript-fp32", "plain"),
        ("onnxruntime-cpu-fp16", "wrong"),
    ]
    baseline, best = chart.bars[:2]
    assert baseline.width == chart.rule
    assert best.width == pytest.approx(3.41 * baseline.width, rel=1e-3)
    assert best.high == figures.FULL
    assert best.low is not None
    assert best.low < best.width < best.high


def test_notes_of_bars() -> None:
    manifest = example()
    timing_of(manifest, "onnxruntime-cpu-fp16")["steady"] = False
    chart = figures.speed_chart(view.optimum(manifest), baseline="torch-eager", best=BEST, wrong=[], caption="")
    assert [bar.note.split(" · ")[1:] for bar in chart.bars] == [
        ["baseline"],
        ["0.375 ms", "best"],
        ["1.25 ms", "no clear difference"],
        ["1.50 ms", "slower", "never steady"],
    ]


@given(st.lists(st.floats(0, 1e5), max_size=12))
def test_stage_bars_follow_each_other_inside_the_chart(durations: list[float]) -> None:
    chart = figures.stage_chart([Stage(name="stage", seconds=value, detail="") for value in durations])
    starts = [bar.start for bar in chart.bars]
    assert starts == sorted(starts)
    assert all(bar.start >= 0 and bar.start + bar.width <= 100 for bar in chart.bars)


def test_stages_that_took_no_time_are_left_out() -> None:
    stages = [Stage(name=name, seconds=value, detail="") for name, value in (("build", 2.0), ("write bundle", 0.0))]
    assert [bar.label for bar in figures.stage_chart(stages).bars] == ["build"]


def test_what_the_speed_up_is_the_ratio_of_is_said() -> None:
    assert "The speed-up is the median of the rounds' ratios" in page(example()).text


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (numbers.number, 0.84213, "0.842"),
        (numbers.number, 12.345, "12.3"),
        (numbers.number, 99.96, "100"),
        (numbers.number, 21328.4, "21,328"),
        (numbers.number, 203_530, "203,530"),
        (numbers.number, 0.00012, "1.2e-4"),
        (numbers.number, 0.0, "0"),
        (numbers.number, -math.inf, "−∞"),  # noqa: RUF001
        (numbers.error, 2.34e-7, "2.3e-7"),
        (numbers.error, 1e-4, "1e-4"),
        (numbers.error, 0.25, "0.250"),
        (numbers.error, math.nan, "NaN"),
        (numbers.cosine, 1.0, "1"),
        (numbers.cosine, 0.9987, "0.9987"),
        (numbers.cosine, 0.99999, "0.99999"),
        (numbers.cosine, 1 - 3.1e-9, "1 − 3.1e-9"),  # noqa: RUF001
        (numbers.cosine, None, "—"),
        (numbers.share, 1.0, "100 %"),
        (numbers.share, 0.9861, "98.6 %"),
        (numbers.share, 0.99996, "99.996 %"),
        (numbers.ratio, 3.4149, "3.41×"),  # noqa: RUF001
        (numbers.ratio, 130.4, "130×"),  # noqa: RUF001
        (numbers.seconds, 3.78e-6, "<1 ms"),
        (numbers.seconds, 0.031, "31.0 ms"),
        (numbers.seconds, 38.21, "38.2 s"),
        (numbers.seconds, 125, "2 min 5 s"),
        (numbers.size, 512, "512 B"),
        (numbers.size, 819_204, "819 kB"),
        (numbers.size, 999_999, "1.00 MB"),
        (numbers.size, 3_200_000_000, "3.20 GB"),
        (numbers.percent, 87.5, "87.5 %"),
    ],
)
def test_numbers(show: Callable[[float | None], str], value: float | None, text: str) -> None:
    assert show(value) == text


def test_facts_of_free_form_values() -> None:
    nodes = [f"/features/{index}/Conv_with_a_long_name" for index in range(4)]
    assert facts(
        {
            "cpu_nodes": nodes,
            "timings_s": {"parse": 0.02, "size_bytes": 2000},
            "gpus": [{"name": "H100", "compute_capability": "9.0", "memory_bytes": 80_000_000_000}],
            "seed": 1234,
            "weights": None,
            "cached": True,
            "casts": [],
        }
    ) == (
        Fact("CPU nodes", items=tuple(nodes)),
        Fact("Timings", facts=(Fact("parse", "20.0 ms"), Fact("size", "2.00 kB"))),
        Fact("GPUs", "name H100, compute capability 9.0, memory 80.0 GB"),
        Fact("Seed", "1234"),
        Fact("Weights", "—"),
        Fact("Cached", "yes"),
        Fact("Casts", "none"),
    )


@pytest.mark.parametrize("names", [("image",), ("input.1", "it's\n"), ("class",)])
def test_code_to_load_the_bundle_is_python(names: tuple[str, ...]) -> None:
    code = view.call_example(Signature(inputs=tuple(TensorSpec(name, "float32", (1, 3)) for name in names)))
    call = next(n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name))
    first = call.keywords[0]
    spread = first.value.keys if isinstance(first.value, ast.Dict) else []
    given_names = [ast.literal_eval(key) for key in spread if key] or [item.arg for item in call.keywords]
    assert given_names == list(names)


def test_colours_reach_the_contrast_of_wcag_aa_in_both_themes() -> None:
    css = (Path(view.__file__).parent / "report.css").read_text()
    themes = [
        dict(re.findall(r"--(\w[\w-]*): (#\w{6});", part)) for part in css.split("@media (prefers-color-scheme")[:2]
    ]

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(theme: dict[str, str], one: str, other: str) -> float:
        low, high = sorted((luminance(theme[one]), luminance(theme[other])))
        return (high + 0.05) / (low + 0.05)

    for theme in themes:
        for text in ("text", "muted", "accent", "bad"):
            assert contrast(theme, text, "page") >= 4.5
        assert contrast(theme, "text", "panel") >= 4.5
        assert contrast(theme, "bad", "bad-panel") >= 4.5
        for mark in ("bar", "soft", "accent"):
            assert contrast(theme, mark, "page") >= 3


def test_write_report_survives_names_that_are_not_text(tmp_path: Path) -> None:
    manifest = example()
    manifest["source"]["weights"] = "caf\udce9.pt"
    write_report(manifest, tmp_path / "report.html")
    assert "caf&#56553;.pt" in (tmp_path / "report.html").read_text(encoding="utf-8")
