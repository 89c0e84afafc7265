"""Checking claims: trials, stores, executors, statistics, verdicts, reports. Knows no method by name."""

from .claim import Claim, Task, claim, load_claim
from .expectations import Bound, Close, Gain, Ratio, Verdict
from .run import Run
from .settings import Settings, scaled

__all__ = [
    "Bound",
    "Claim",
    "Close",
    "Gain",
    "Ratio",
    "Run",
    "Settings",
    "Task",
    "Verdict",
    "claim",
    "load_claim",
    "scaled",
]
