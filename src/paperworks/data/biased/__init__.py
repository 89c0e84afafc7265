"""Sets merged from several sources, and splits in which class and source are confounded."""

from paperworks.data.biased.mixbasic import load_mixbasic
from paperworks.data.biased.protocols import (
    ConfoundedSplit,
    confounded_split,
    leave_one_source_out,
    mixed_folds,
)
from paperworks.data.biased.sourced import SourcedData, load_folders, merge
from paperworks.data.biased.styles import digit_styles, printed_digits, segment_digits

__all__ = [
    "ConfoundedSplit",
    "SourcedData",
    "confounded_split",
    "digit_styles",
    "leave_one_source_out",
    "load_folders",
    "load_mixbasic",
    "merge",
    "mixed_folds",
    "printed_digits",
    "segment_digits",
]
