"""Calibration: data to run a model on, and the statistics of its tensors that passes ask for."""

from nmcompile.calibrate.collect import Calibration, check_ids, longest
from nmcompile.calibrate.data import Data, open_data, split
from nmcompile.calibrate.statistics import Histogram, Statistics

__all__ = ["Calibration", "Data", "Histogram", "Statistics", "check_ids", "longest", "open_data",
           "split"]  # fmt: skip
