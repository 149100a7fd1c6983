"""What a soft label does to a model: uncertainty, diversity and calibration of its predictions.

Functions of all predictions at once, and torchmetrics classes (extra ``softlabels[metrics]``) that are fed batch by
batch and synchronised between processes. All take logits first and class indices second.
"""

import importlib.util
import sys
from typing import TYPE_CHECKING, Any

from softlabels.metrics.calibration import ReliabilityCurve, calibration_error, reliability_curve
from softlabels.metrics.diversity import confidence_diversity
from softlabels.metrics.uncertainty import average_predictive_uncertainty, predictive_entropy

if TYPE_CHECKING:
    from softlabels.metrics.streaming import AveragePredictiveUncertainty, CalibrationError, ConfidenceDiversity

__all__ = [
    "ReliabilityCurve",
    "average_predictive_uncertainty",
    "calibration_error",
    "confidence_diversity",
    "predictive_entropy",
    "reliability_curve",
]
if importlib.util.find_spec("torchmetrics") is not None:  # what is public can be had: import *, help and inspect ask
    __all__ += ["AveragePredictiveUncertainty", "CalibrationError", "ConfidenceDiversity"]

_STREAMING = ("AveragePredictiveUncertainty", "CalibrationError", "ConfidenceDiversity")


def __getattr__(name: str) -> Any:
    """Import torchmetrics when a class that needs it is asked for, not before."""
    if name not in _STREAMING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from softlabels.metrics import streaming
    except ImportError as error:
        remedy = (
            f"softlabels.metrics.{name} needs torchmetrics: pip install 'softlabels[metrics]'. The functions of "
            "softlabels.metrics need nothing but torch."
        )
        # `from softlabels.metrics import CalibrationError` would replace an AttributeError and its remedy.
        asked_by = sys._getframe(1).f_globals.get("__name__")
        kind = ImportError if asked_by == "importlib._bootstrap" else AttributeError
        raise kind(remedy) from error
    return getattr(streaming, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
