"""Streams of tasks, and how well each was learnt and kept."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperworks.data import LabelledData
from paperworks.errors import UserError
from paperworks.nn import keeping_modes

Matrix = Float[Tensor, "tasks tasks"]


@dataclass(frozen=True, eq=False)
class ContinualTask:
    """One task of a stream: its classes, and the examples of these. Targets are indices among all classes."""

    classes: tuple[int, ...]
    train: LabelledData
    test: LabelledData


def split_by_class(
    train: LabelledData, test: LabelledData, tasks: int | Sequence[Sequence[int]] = 5
) -> list[ContinualTask]:
    """Divide a classification set into tasks with classes of their own, in the order of the classes.

    Args:
        train, test: The set.
        tasks: How many of equally many classes, or the classes of each.

    Raises:
        UserError: If the classes cannot be divided so, overlap, or have no examples.
    """
    if isinstance(tasks, int):
        if tasks < 1 or train.num_classes % tasks:
            raise UserError(f"{train.num_classes} classes cannot be divided equally among {tasks} tasks")
        tasks = torch.arange(train.num_classes).view(tasks, -1).tolist()
    groups = [tuple(int(k) for k in classes) for classes in tasks]
    named = [k for classes in groups for k in classes]
    if bad := [k for k in named if not 0 <= k < train.num_classes]:
        raise UserError(f"class {bad[0]} is none of the {train.num_classes} classes, 0 to {train.num_classes - 1}")
    if twice := sorted({k for k in named if named.count(k) > 1}):
        raise UserError(f"class {twice[0]} is in several tasks: tasks must have classes of their own")
    stream = []
    for classes in groups:
        members = torch.tensor(classes, dtype=torch.long)
        parts = [data.subset(torch.isin(data.targets, members)) for data in (train, test)]
        if not all(map(len, parts)):
            raise UserError(f"the task of classes {list(classes)} has no examples to learn or to test")
        stream.append(ContinualTask(classes, *parts))
    return stream


@torch.no_grad()
def task_accuracies(
    model: nn.Module, tasks: Sequence[ContinualTask], *, batch_size: int = 512
) -> tuple[Float[Tensor, "tasks"], Float[Tensor, "tasks"]]:
    """Test accuracy on each task, class-incremental (among all classes) and task-incremental (among the task's).

    The task-incremental protocol says which task an example is of and is much easier: never report it as the other.
    """
    device = next(model.parameters()).device
    class_il, task_il = [], []
    with keeping_modes(model):
        model.eval()
        for task in tasks:
            logits = torch.cat([model(inputs.to(device)).cpu() for inputs in torch.split(task.test.inputs, batch_size)])
            own = torch.tensor(task.classes)
            class_il.append((logits.argmax(1) == task.test.targets).float().mean())
            task_il.append((own[logits[:, own].argmax(1)] == task.test.targets).float().mean())
    return torch.stack(class_il), torch.stack(task_il)


def average_accuracy(matrix: Matrix) -> float:
    """Mean accuracy over all tasks after the last: the mean of the last row.

    Args:
        matrix: ``matrix[t, i]`` is the accuracy on task ``i`` after learning task ``t``.
    """
    return float(matrix[-1].mean())


def learning_accuracy(matrix: Matrix) -> float:
    """Mean accuracy on each task right after learning it: the mean of the diagonal."""
    return float(matrix.diagonal().mean())


def forgetting(matrix: Matrix) -> float:
    r"""How far accuracy has fallen since its best, over all tasks but the last.

    $$\frac{1}{T - 1} \sum_{i < T} \big(\max_{i \le t < T} R_{t, i} - R_{T, i}\big)$$

    It is negative where later tasks have helped; 0 for a single task.
    """
    if len(matrix) < 2:
        return 0.0
    best = matrix.tril()[:-1, :-1].amax(0)
    return float((best - matrix[-1, :-1]).mean())
