"""FEAT: which few categorical features must change for a classifier to err.

Bao et al., "Towards Efficient and Domain-Agnostic Evasion Attack with High-dimensional Categorical Inputs", AAAI 2023.
Reconstructed from its abstract.
"""

from .attacks import (
    METHODS,
    AttackResult,
    Change,
    attack_batch,
    feat_attack,
    fsgs_attack,
    gradient_attack,
    ompgs_attack,
    random_attack,
    ucb_attack,
)
from .problem import CategoricalProblem
from .report import changes_table
from .search import Round, Step
from .tables import CategoricalTable, load_adult, load_splice, read_categorical
from .victims import SequenceConv, SequenceLSTM

__all__ = [
    "METHODS",
    "AttackResult",
    "CategoricalProblem",
    "CategoricalTable",
    "Change",
    "Round",
    "SequenceConv",
    "SequenceLSTM",
    "Step",
    "attack_batch",
    "changes_table",
    "feat_attack",
    "fsgs_attack",
    "gradient_attack",
    "load_adult",
    "load_splice",
    "ompgs_attack",
    "random_attack",
    "read_categorical",
    "ucb_attack",
]
