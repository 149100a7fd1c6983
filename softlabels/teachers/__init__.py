"""Teachers, and how a loss gets at the batch that its model has just seen."""

from softlabels.teachers.ema import EMATeacher

__all__ = ["EMATeacher"]
