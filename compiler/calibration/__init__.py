"""What activations do on real data: statistics in one pass, and the ranges that quantizers and casts take from them."""

from .calibration import Calibration
from .findings import Finding
from .histogram import Histogram
from .limits import METHODS, Method, limits
from .settings import CalibrationSettings
from .statistics import Statistics, TensorStatistics

__all__ = [
    "METHODS",
    "Calibration",
    "CalibrationSettings",
    "Finding",
    "Histogram",
    "Method",
    "Statistics",
    "TensorStatistics",
    "limits",
]
