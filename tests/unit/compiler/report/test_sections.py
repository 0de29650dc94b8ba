"""The parts of the page, and of the terminal, that show what a compile found out."""

from __future__ import annotations

import copy
import html.parser
import math
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from enginesmith.compiler.bundle import Bundle
from enginesmith.compiler.console.console import show_bundle
from enginesmith.compiler.console.ladder import show_ladder
from enginesmith.compiler.report import render, view

FOLDER = Path(__file__).parent
example = runpy.run_path(str(FOLDER.parent / "manifest_example.py"))["example"]
made = runpy.run_path(str(FOLDER / "searches_example.py"))
searched, ladder, step, point, CPU = (made[name] for name in ("searched", "ladder", "step", "point", "CPU"))
Page = runpy.run_path(str(FOLDER.parent / "test_report.py"))["Page"]
SECTIONS = ["search", "trade-off", "batch-size", "roofline", "service"]
HOSTILE = "<script>alert(1)</script>\"'><img src=x>"


def text_of(manifest: Any) -> str:
    text: str = Page(render(manifest)).text
    return text


def test_sections_follow_the_accuracy_and_have_links() -> None:
    found = Page(render(searched(example())))
    place = found.ids.index("accuracy")
    assert found.ids[place + 1 : place + 6] == SECTIONS
    assert {value for name, value in found.attributes if name == "href"} >= {f"#{name}" for name in SECTIONS}


@pytest.mark.parametrize("missing", [{}, {"ladder": None, "batches": [], "roofline": None, "services": []}])
def test_what_was_not_looked_for_is_not_there(missing: dict[str, Any]) -> None:
    manifest = {**example(), "benchmark": None, **missing}
    assert not set(SECTIONS) & set(Page(render(manifest)).ids)
    assert not set(SECTIONS) & set(view.sections(manifest))


def test_the_search_in_words_and_numbers() -> None:
    text = text_of(searched(example()))
    assert "The objective is latency, the effort default; the search took 3 min 2 s of 20 min 0 s." in text
    assert f"{CPU}: 4 of 8 steps kept" in text
    assert "1 step was left out; the table says why" in text
    assert "quantization int8-dynamic 0.80× 0.78× to 0.82× · reverted: slower" in text  # noqa: RUF001
    assert "threads kept, known from before 1.30×" in text  # noqa: RUF001
    assert "prune:macs=0.75 top1=0.99, measured 0.910. not close enough: the budget top1=0.99 is exceeded" in text
    assert "alignment kept, not measured — —" in text
    assert "it cannot be timed on this machine, and was asked for" in text
    assert "There was no time for some steps." not in text


def test_a_search_that_ran_out_of_time_says_what_to_do() -> None:
    text = text_of({**example(), "ladder": ladder(complete=False)})
    assert "There was no time for some steps. Compile again with a higher --time-limit: the search goes on" in text


def test_throughput_and_size_are_told_as_such() -> None:
    text = text_of({**example(), "ladder": ladder(objective="throughput")})
    assert "Gain in throughput over the captured graph" in text
    assert "95 % interval Samples/s Relative L2" in text
    text = text_of({**example(), "ladder": ladder(objective="size=0.25")})
    assert "How many times smaller than the captured graph" in text
    assert "it is smaller by the share that was asked for" in text


def test_long_searches_are_folded_but_drawn_in_full() -> None:
    text = render({**example(), "ladder": made["long_ladder"]()})
    assert "<details><summary>41 steps of onnxruntime-cpu in numbers" in text
    assert text.count('<li class="kept"') == 6
    assert text.count('<li class="reverted"') == 34


def test_the_trade_off_is_told_in_a_table_too() -> None:
    text = text_of(searched(example()))
    assert f"1 {CPU}-int8-tuned 0.138 0.0129 picked, on the front" in text
    assert f"5 {CPU}-fp32 0.375 2.3e-7 on the front" in text
    assert f"— {CPU}, pruning prune:macs=0.75 — 0.210 not close enough, so not timed" in text
    assert "The budget is top1=0.99, which this scale does not show." in text


def test_batch_sizes_in_words_and_numbers() -> None:
    text = text_of(searched(example()))
    assert (
        "Batch 96 is the largest that runs. From batch 16 on, larger batches add less than 5 % of throughput." in text
    )
    assert "Batch 8 gives the most within a p99 of 5.00 ms." in text
    assert "8 3,320 2.41 3.37 792 MB best" in text
    assert "128 — — — — does not run out of memory: 4.1 GB were asked for, 3.6 GB were free" in text


def test_batch_sizes_of_which_none_is_good_enough() -> None:
    curve = {**made["batch_curve"](), "best": None, "p99_limit_ms": 1.0, "largest_is_limit": True}
    text = text_of({**example(), "batches": [curve]})
    assert "Batch 96 runs, and no larger one was asked for." in text
    assert "No batch size keeps a p99 of 1 ms, the smallest, 1, takes 1.19 ms." in text
    nothing = {"points": [point(1, None, None, "no memory")], "largest": 0, "saturation": None, "best": None}
    text = text_of({**example(), "batches": [{**made["batch_curve"](), **nothing}]})
    assert "No batch size that was tried runs. No batch size keeps a p99 of 5 ms: none could be timed." in text
    assert "1 — — — — does not run no memory" in text


def test_a_p99_of_few_calls_is_marked() -> None:
    curve = made["batch_curve"]()
    curve["points"][7] |= {"calls": 60, "gpu_utilization_percent": 87.5}
    assert "87.5 % 2.90 GB largest p99 of 60 calls only" in text_of({**example(), "batches": [curve]})


def test_the_roofline_in_words_and_numbers() -> None:
    text = text_of(searched(example()))
    assert "This machine computes at most 190 GFLOP/s and moves at most 13.4 GB/s" in text
    assert "1 /layer1/0/conv1/Conv Conv 24.9 % 1.90 121 209 1.10 MB arithmetic" in text
    assert "6 Memcpy_token_3 MemcpyToHost 5.2 % 0.400 — — 800 kB copies between devices" in text
    assert "1 node that computes nothing or was not timed is in the table only." in text
    assert "--align 8 /fc/Gemm 0.310 kept: 1.06 times the speed 1,001 columns are no multiple of 8" in text
    assert "--precision fp16 /layer1/Add 0.200 not tried" in text


def test_many_nodes_are_folded() -> None:
    roofline = made["roofline"]()
    roofline["nodes"] *= 3
    assert "<details><summary>15 more nodes</summary>" in render({**example(), "roofline": roofline})


def test_each_drawing_says_what_is_to_be_seen() -> None:
    text = render(searched(example()))
    labels = [html.unescape(found) for found in re.findall(r'role="img" aria-label="([^"]*)"', text)]
    assert len(labels) == 5
    assert labels[0].startswith(
        "Error against latency at batch 8; further down and to the left is better. On the Pareto"
    )
    assert "3,320 at batch 8" in labels[1]
    assert "3.37 ms at batch 8" in labels[2]
    assert "Most time is taken by 1 /layer1/0/conv1/Conv (24.9 %)" in labels[3]
    assert labels[4].endswith("p99 1.60 ms at 1,000, p99 2.80 ms at 5,000, p99 11.0 ms at 9,000")


def poison(value: Any) -> Any:
    """All texts but those that are one of a few words get a hostile end."""
    if isinstance(value, dict):
        keep = ("status", "bound", "objective", "device")
        return {key: item if key in keep else poison(item) for key, item in value.items()}
    if isinstance(value, list):
        return [poison(item) for item in value]
    return f"{value}{HOSTILE}" if isinstance(value, str) else value


def test_hostile_names_are_text() -> None:
    clean = searched(example())
    hostile = {key: poison(clean[key]) for key in ("ladder", "batches", "roofline")}
    hostile["ladder"]["picks"] = {
        f"{key}{HOSTILE}": f"{name}{HOSTILE}" for key, name in clean["ladder"]["picks"].items()
    }
    for own in hostile["ladder"]["steps"]:
        if own["budget"]:
            own["budget"]["text"] = f"top1=0.99{HOSTILE}"
    text = render({**clean, **hostile})
    assert "<script" not in text
    assert "<img" not in text
    assert not {"script", "img"} & Page(text).tags
    assert text.count("&lt;script&gt;alert(1)") > 100


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf, 0.0, -1.0])
def test_numbers_that_do_not_exist_break_nothing(bad: float | None) -> None:
    def broken(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: broken(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return [broken(item, key) for item in value]
        known = key in ("share", "flops", "bytes", "seconds", "time_limit_s") and bad is None
        return bad if isinstance(value, float) and not known else value

    clean = searched(example())
    manifest = {**clean, **{key: broken(copy.deepcopy(clean[key])) for key in ("ladder", "batches", "roofline")}}
    text = render(manifest)
    assert not re.search(r"\bnan\b|\binf\b|None", Page(text).text)
    assert not re.search(r'="(nan|inf|-inf)', text)
    assert set(SECTIONS) <= set(Page(text).ids)


def shown(record: Any, width: int = 160) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show_ladder(console, record)
    return "\n".join(" ".join(line.split()) for line in console.export_text().splitlines())


def test_the_terminal_tells_the_same() -> None:
    text = shown(ladder(complete=False))
    assert "step changes outcome gain 95 % interval p50 ms rel. L2" in text
    assert f"{CPU}: quantization int8 quantize-static kept 1.90 1.84 to 1.96 0.197 1.3e-02" in text
    assert f"{CPU}: threads threads=2 reverted: no clear gain 1.01 0.98 to 1.04" in text
    assert f"{CPU}: pruning prune:macs=0.75 reverted: not close enough - - - 2.1e-01" in text
    assert "tensorrt-rtx: alignment align:multiple=8 kept, not measured - - - -" in text
    assert f"{CPU}: 4 of 8 steps kept" in text
    assert "precision bf16: onnxruntime has no Conv in bf16" in text
    assert "sparsity 2:4: it needs calibration data" in text
    assert "give a higher --time-limit" in text
    assert "--time-limit" not in shown(ladder())


def test_long_texts_and_narrow_terminals() -> None:
    text = shown(made["long_ladder"]())
    assert "question 2 option_2=value with conv_algo_search=EXHAUS… kept 1.25" in text
    assert "step outcome gain 95 % interval" in shown(made["long_ladder"](), width=70)


def test_brackets_in_names_are_no_markup() -> None:
    start = step("captured graph", "a", "a", "start")
    failed = step("threads", "[red]x[/]", "b", "failed", reason="[bold]no[/]")
    reverted = step("threads", "[/]y", "b", "reverted", 0.9)
    text = shown(ladder(start, failed, reverted, picks={"a": "a"}))
    assert "threads [red]x[/]: [bold]no[/]" in text
    assert "threads [/]y reverted: slower 0.90" in text


def test_a_bundle_shows_its_ladder(capsys: pytest.CaptureFixture[str]) -> None:
    show_bundle(Bundle(Path("out"), searched(example())))
    assert f"{CPU}: 4 of 8 steps kept" in capsys.readouterr().out


def test_the_service_beside_the_engine() -> None:
    text = text_of(searched(example()))
    assert "Served to one client it takes 0.651 ms more at the median than the engine by itself." in text
    told = "With 64 clients it answers 9,400 requests a second, 2.50 rows in a run of the engine: 1.22× what calls"  # noqa: RUF001
    assert told in text
    assert "The knee is at 5,000 requests a second." in text
    assert "the engine by itself 0.129 0.200 7,700 1 —" in text
    assert "1 clients 0.780 1.56 1,250 2.50 0.651" in text
    assert "64 clients 6.60 13.2 9,400 2.50 6.47 3 unavailable it is behind" in text
    assert "127.0.0.1:8001: recorded samples, every answer compared with the reference." in text


def test_a_service_whose_engine_was_not_timed_and_that_failed() -> None:
    manifest: Any = searched(example())
    manifest["services"][0] |= {"engine": None, "overhead_ms": None, "open": [], "knee": None}
    manifest["services"][0]["problems"] = [f"12 wrong answers at {HOSTILE}"]
    page = render(manifest)
    assert HOSTILE not in page
    text: str = Page(page).text
    assert "The benchmark has no times of the engine at this batch, so that what serving adds is not known." in text
    assert "12 wrong answers at <script>" in text
    assert "1 clients 0.780 1.56 1,250 2.50 —" in text
    assert "The knee is" not in text[text.index("no times of the engine") :]
