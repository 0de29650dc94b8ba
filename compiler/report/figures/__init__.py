"""Geometry of the charts, one kind a file; the templates draw it as SVG in the page's colours.

Across, places are in percent of the drawing's width; down, they are in pixels.
"""

from __future__ import annotations

from .axes import Axis, Tick, linear, logarithmic, short
from .bars import FULL, MOST, SLIVER, Bar, Chart, sensitivity_chart, speed_chart, stage_chart
from .batches import batch_plots
from .curve import Curve, CurvePoint, GridLine, curve_chart
from .plot import Entry, Label, Line, Mark, Note, Plot, labelled, outline
from .roofline import BOUNDS, is_drawn, ranked, roofline_plot
from .trade_off import trade_off_plot
from .waterfall import Row, Waterfall, waterfall

__all__ = [
    "BOUNDS", "FULL", "MOST", "SLIVER", "Axis", "Bar", "Chart", "Curve", "CurvePoint", "Entry", "GridLine", "Label", "Line",
    "Mark", "Note", "Plot", "Row", "Tick", "Waterfall", "batch_plots", "curve_chart", "is_drawn", "labelled",
    "linear", "logarithmic", "outline", "ranked", "roofline_plot", "sensitivity_chart", "short", "speed_chart",
    "stage_chart", "trade_off_plot", "waterfall",
]  # fmt: skip
