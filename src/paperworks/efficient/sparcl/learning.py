"""Learning a stream of tasks with the trainer, and what that costs."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from paperworks.errors import UserError
from paperworks.train import History, Intervention, State, Trainer
from paperworks.train.batches import Batches

from .ddr import ActiveBatches, DynamicDataRemoval
from .flops import flops_with, forward_flops
from .replay import Replay, single_head_cross_entropy
from .sparcl import SparCL
from .tasks import ContinualTask, average_accuracy, forgetting, learning_accuracy, task_accuracies


@dataclass
class LearnedTasks:
    """How a stream was learnt.

    Attributes:
        class_il, task_il: Accuracy on task ``i`` after learning task ``t``, among all classes and among the task's.
        histories: The trainer's figures, one a task.
    """

    class_il: Tensor
    task_il: Tensor
    histories: list[History] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """Average accuracy of both protocols, accuracy right after learning, and forgetting (class-incremental)."""
        return {
            "class_il": average_accuracy(self.class_il),
            "task_il": average_accuracy(self.task_il),
            "learning": learning_accuracy(self.class_il),
            "forgetting": forgetting(self.class_il),
        }


def learn_tasks(
    model: nn.Module,
    tasks: Sequence[ContinualTask],
    *,
    trainer: Callable[[int, list[Intervention]], Trainer],
    optimizer: Callable[[Iterator[nn.Parameter]], Optimizer],
    sparse: SparCL | None = None,
    replay: Replay | None = None,
    removal: Callable[[int], DynamicDataRemoval] | None = None,
    interventions: Sequence[Intervention] = (),
    single_head: bool = True,
) -> LearnedTasks:
    """Learn one task after the other, and test on all of them after each; in one process.

    Without ``sparse``, ``replay`` and ``removal`` this is plain fine-tuning; each can be had by itself. A stream that
    was killed is taken up again where it was, if the trainers have a ``checkpoint_dir`` of their own each.

    Args:
        model: Learns in place; it has a logit for each class of all tasks.
        tasks: The stream, e.g. from ``split_by_class``.
        trainer: Makes the trainer of a task from its number, from 0, and its interventions. ``batch_size`` and
            ``seed`` are the trainer's.
        optimizer: Makes each task's optimizer from the parameters; ``partial(SGD, lr=0.03)`` in the paper.
        sparse: Masks weights and gradients.
        replay: Rehearses earlier tasks, from the second on.
        removal: Makes a task's data removal from its number of examples.
        interventions: Others, the same for all tasks.
        single_head: Learn each task among its own classes only (``single_head_cross_entropy``), as the paper; else
            among all.

    Example:
        >>> buffer = ReservoirBuffer(200, torch.Generator().manual_seed(0))
        >>> replay = Replay(buffer, "der++")
        >>> learned = learn_tasks(
        ...     model,
        ...     split_by_class(train, test, 5),
        ...     trainer=lambda t, joined: Trainer(50, interventions=joined, batch_size=32, seed=t),
        ...     optimizer=partial(SGD, lr=0.03),
        ...     sparse=SparCL(0.75, replay=replay),
        ...     replay=replay,
        ...     removal=DynamicDataRemoval,
        ... )
        >>> learned.summary()["class_il"]
    """
    if not tasks:
        raise UserError("tasks must hold at least one task")
    if sparse is not None and sparse.replay is not replay:
        raise UserError("sparse and replay must go together: SparCL(..., replay=replay)")
    learned = LearnedTasks(torch.zeros(len(tasks), len(tasks)), torch.zeros(len(tasks), len(tasks)))
    for t, task in enumerate(tasks):
        if replay is not None:
            replay.rehearse = t > 0
        examples = len(task.train)
        drops = removal(examples) if removal else None
        joined = [i for i in (*interventions, sparse, replay, drops) if i is not None]
        fit = trainer(t, joined)
        if fit.fabric.world_size > 1:
            raise UserError(f"a stream of tasks is learnt in one process, got devices for {fit.fabric.world_size}")
        data = TensorDataset(task.train.inputs, task.train.targets, torch.arange(examples))
        sampler = (
            ActiveBatches(drops, fit.batch_size, seed=fit.seed)
            if drops
            else Batches(examples, fit.batch_size, seed=fit.seed)
        )
        criterion = partial(single_head_cross_entropy, classes=task.classes) if single_head else F.cross_entropy
        loader: DataLoader[Any] = DataLoader(data, sampler=sampler, batch_size=None)
        learned.histories.append(fit.fit(model, loader, loss=criterion, optimizer=optimizer))
        learned.class_il[t], learned.task_il[t] = task_accuracies(model, tasks)
    return learned


class TrainingMeter(Intervention):
    """Counts what training costs: FLOPs as ``training_flops`` has them, steps, examples, and seconds.

    All passes count, those of the replay too. A step that draws up a gradient mask computes the gradients of all
    live weights. Put it first in the list, so that the time of the others is measured.

    Args:
        input_shape: Shape of one example.
        sparse, replay: What else is in the list.
        clock: Seconds are those of ``time.perf_counter`` (wall) or ``time.process_time`` (CPU), of whole epochs.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        *,
        sparse: SparCL | None = None,
        replay: Replay | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.input_shape, self.sparse, self.replay, self.clock = tuple(input_shape), sparse, replay, clock
        self.flops, self.seconds, self.steps, self.examples = 0.0, 0.0, 0, 0
        self._costs: dict[tuple[int, bool], float] = {}
        self._began = 0.0

    def setup(self, state: State) -> None:
        if not self._costs:
            self._forward = forward_flops(state.module, self.input_shape)

    def on_epoch_start(self, state: State) -> None:
        self._began = self.clock()

    def on_step_end(self, state: State) -> None:
        examples = len(state.inputs) + (self.replay.drawn if self.replay else 0)
        self.flops += examples * self._cost()
        self.steps += 1
        self.examples += examples

    def _cost(self) -> float:
        """FLOPs of an example; they change with the mask only."""
        sparse = self.sparse
        key = (sparse.mask.version, sparse.refreshed) if sparse else (0, False)
        if key not in self._costs:
            mask = sparse.mask if sparse else None
            left_out = sparse.gradient_sparsity if sparse and not sparse.refreshed else 0.0
            self._costs[key] = flops_with(self._forward, mask, left_out)
        return self._costs[key]

    def on_epoch_end(self, state: State) -> None:
        if state.fabric.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds += self.clock() - self._began

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("flops", "seconds", "steps", "examples")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in state_dict.items():
            setattr(self, name, value)
