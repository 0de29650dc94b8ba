"""A load test as a page."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ... import __version__
from ...compiler.report import templates
from ...compiler.report.figures.service import service_plot
from ...compiler.storage.files import storage_errors


def write_report(result: Mapping[str, Any], path: Path) -> None:
    """Writes the page to `path`.

    Raises:
        OutputError, StorageError: it cannot be written.
    """
    own = result["engine"]["p50_ms"] if result["engine"] else None
    text = (
        templates()
        .get_template("service.html.j2")
        .render(
            result=result,
            chart=service_plot(result["open"], result["knee"], own),
            version=__version__,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
    )
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
