"""SparCL: continual learning with sparse weights, sparse gradients and fewer examples, on top of replay.

Wang et al., "SparCL: Sparse Continual Learning on the Edge", NeurIPS 2022.
"""

from .ddr import ActiveBatches, DynamicDataRemoval
from .dgm import DynamicGradientMask, gradient_mask
from .execution import SparseExecution
from .flops import forward_flops, layer_training_flops, training_flops
from .learning import LearnedTasks, TrainingMeter, learn_tasks
from .masks import SparsityMask
from .replay import Replay, ReservoirBuffer, der_pp_loss, er_loss, single_head_cross_entropy
from .sparcl import SparCL
from .tasks import (
    ContinualTask,
    average_accuracy,
    forgetting,
    learning_accuracy,
    split_by_class,
    task_accuracies,
)
from .tdm import TaskAwareDynamicMask, weight_importance

__all__ = [
    "ActiveBatches",
    "ContinualTask",
    "DynamicDataRemoval",
    "DynamicGradientMask",
    "LearnedTasks",
    "Replay",
    "ReservoirBuffer",
    "SparCL",
    "SparseExecution",
    "SparsityMask",
    "TaskAwareDynamicMask",
    "TrainingMeter",
    "average_accuracy",
    "der_pp_loss",
    "er_loss",
    "forgetting",
    "forward_flops",
    "gradient_mask",
    "layer_training_flops",
    "learn_tasks",
    "learning_accuracy",
    "single_head_cross_entropy",
    "split_by_class",
    "task_accuracies",
    "training_flops",
    "weight_importance",
]
