"""MRCLens: what in a reading-comprehension set can be solved by superficial cues, before a reader is trained."""

from paperworks.audit.mrclens.auditing import CueProbe, Score, audit, cue_statistic
from paperworks.audit.mrclens.cues import CUES, Cue
from paperworks.audit.mrclens.data import MRCDataset
from paperworks.audit.mrclens.example import Answer, Example
from paperworks.audit.mrclens.reader import ReaderData, SentenceReader, reader_data
from paperworks.audit.mrclens.report import AuditReport, Finding, Gap, Split, predict_gap
from paperworks.audit.mrclens.statistics import balancing_weights, bootstrap_ci, permutation_pvalue, shared_hits
from paperworks.audit.mrclens.synthetic import SyntheticMRC
from paperworks.audit.mrclens.text import split_sentences

__all__ = [
    "CUES",
    "Answer",
    "AuditReport",
    "Cue",
    "CueProbe",
    "Example",
    "Finding",
    "Gap",
    "MRCDataset",
    "ReaderData",
    "Score",
    "SentenceReader",
    "Split",
    "SyntheticMRC",
    "audit",
    "balancing_weights",
    "bootstrap_ci",
    "cue_statistic",
    "permutation_pvalue",
    "predict_gap",
    "reader_data",
    "shared_hits",
    "split_sentences",
]
