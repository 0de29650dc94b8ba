"""Writes report.html: one self-contained page, without scripts, that says what was built, how right and how fast.

Beside the typed parts of the manifest it reads `verdict` {"passed": bool, "state": "passed" or "unproven" or "failed",
"best": engine or None, "reasons": [str]}, `data` {"random": bool, ...} and, for its title, "model" of `source`; every
entry of `source`, `data`, `environment` and an engine's `details` is shown under its name.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from ..batch import choice
from ..manifest import Manifest
from . import choices, facts, figures, numbers, search, view

if TYPE_CHECKING:
    import jinja2

_HERE = Path(__file__).parent


@functools.cache
def templates() -> jinja2.Environment:
    """The templates of this folder, which compiles each once.

    Every text is escaped: names of files, nodes and tensors are not to be trusted.
    """
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = (numbers.number, numbers.error, numbers.cosine, numbers.percent, numbers.share, numbers.ratio)
    environment.filters.update({filter_.__name__: filter_ for filter_ in (*shown, numbers.seconds, numbers.size)})
    environment.globals["css"] = Markup((_HERE / "report.css").read_text(encoding="utf-8"))
    return environment


def render(manifest: Manifest) -> str:
    """The page."""
    benchmark = manifest["benchmark"]
    timings = view.optimum(manifest)
    best = view.best_engine(manifest)
    speed = figures.speed_chart(
        timings,
        baseline=benchmark["baseline"],
        best=best,
        wrong=view.wrong_engines(manifest["engines"]),
        caption=f"Speed against {benchmark['baseline']} at {view.size_label(timings[0])}; longer is faster",
    ) if benchmark and timings else None  # fmt: skip
    return (
        templates()
        .get_template("report.html.j2")
        .render(
            manifest=manifest,
            view=view,
            facts=facts.facts,
            figures=figures,
            CALLS=choice.CALLS,
            unmet=choice.unmet,
            search=search,
            choices=choices.choices(manifest),
            headline=view.headline(manifest),
            signature=view.read_signature(manifest),
            best=best,
            speed=speed,
            stages=figures.stage_chart(manifest["stages"]),
        )
    )


def write_report(manifest: Manifest, path: Path) -> None:
    """Writes the page to `path`. Bytes of file names that are no text become replacement characters."""
    path.write_text(render(manifest), encoding="utf-8", errors="xmlcharrefreplace")
