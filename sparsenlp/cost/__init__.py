"""The cost model: how long a linear layer will take here, dense or sparse, without timing it."""

from .cache import calibrated
from .calibration import calibrate
from .law import Work
from .model import CostModel, Fitted, Kind

__all__ = ["CostModel", "Fitted", "Kind", "Work", "calibrate", "calibrated"]
