"""Geometry of the charts, one kind a file; the templates draw it as SVG in the page's colours.

Across, places are in percent of the drawing's width; down, they are in pixels.
"""

from __future__ import annotations

from .axes import Tick, linear, logarithmic, short
from .bars import FULL, sensitivity_chart, speed_chart, stage_chart
from .batches import batch_plots
from .curve import curve_chart
from .plot import Plot, labelled, outline
from .roofline import BOUNDS, ranked, roofline_plot
from .service import service_plot
from .trade_off import trade_off_plot
from .waterfall import Waterfall, waterfall

__all__ = [
    "BOUNDS", "FULL", "Plot", "Tick", "Waterfall", "batch_plots", "curve_chart", "labelled", "linear", "logarithmic",
    "outline", "ranked", "roofline_plot", "sensitivity_chart", "service_plot", "short", "speed_chart", "stage_chart",
    "trade_off_plot", "waterfall",
]  # fmt: skip
