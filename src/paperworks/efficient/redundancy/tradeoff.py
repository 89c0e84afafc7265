"""What a technique gains and loses, knob by knob, beside the dense model."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from paperworks.errors import UserError

Predict = Callable[[Tensor], Tensor]


def measure_tradeoff(
    technique: Callable[[nn.Module, Any], Predict],
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    knobs: Iterable[Any],
    *,
    batch_size: int = 128,
    rounds: int = 5,
) -> pd.DataFrame:
    """Measure speed and accuracy of a technique at several settings, dense and technique by turns.

    Args:
        technique: ``(model, knob)`` to what predicts logits ``[n, classes]``. It gets a copy of the model, which it may
            change.
        model: The dense model, in evaluation mode.
        data: Inputs and class indices.
        knobs: Settings of the technique.
        batch_size: Examples a call.
        rounds: Times each is timed; the medians count.

    Returns:
        One row a knob, the dense model first with knob ``None``: ``accuracy``, ``agreement`` with the dense model,
        ``wall_ms`` of a pass over the data, ``speedup`` (the median ratio within a round) and ``flops``, counted while
        it runs, so that what is skipped is not counted.

    Raises:
        UserError: If there is no data or the model is in training mode.

    Example:
        >>> measure_tradeoff(lambda model, tau: ResolutionCascade(low, model, threshold=tau), model, (x, y), (0.5, 0.9))
    """
    inputs, targets = data
    if not len(inputs) or len(inputs) != len(targets):
        raise UserError(f"data must be as many inputs as targets, at least one: got {len(inputs)} and {len(targets)}")
    if model.training:
        raise UserError("the model must be in evaluation mode: call model.eval() first")
    if rounds < 1 or batch_size < 1:
        raise UserError(f"rounds and batch_size must be at least 1, got {rounds} and {batch_size}")
    batches = torch.split(inputs, batch_size)
    dense = _answers(model, batches)
    rows = [_row(None, model, model, batches, dense, targets, rounds)]
    for knob in knobs:
        rows.append(_row(knob, technique(copy.deepcopy(model), knob), model, batches, dense, targets, rounds))
    return pd.DataFrame(rows)


@torch.no_grad()
def _row(
    knob: Any,
    predict: Predict,
    model: nn.Module,
    batches: tuple[Tensor, ...],
    dense: Tensor,
    targets: Tensor,
    rounds: int,
) -> dict[str, Any]:
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its operations are not counted
    try:
        with FlopCounterMode(display=False) as counter:
            answers = _answers(predict, batches)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    times = [(_seconds(model, batches), _seconds(predict, batches)) for _ in range(rounds)]
    return {
        "knob": knob,
        "accuracy": float((answers == targets).float().mean()),
        "agreement": float((answers == dense).float().mean()),
        "wall_ms": 1e3 * statistics.median(ours for _, ours in times),
        "speedup": statistics.median(theirs / ours for theirs, ours in times),
        "flops": counter.get_total_flops(),
    }


@torch.no_grad()
def _answers(predict: Predict, batches: Iterable[Tensor]) -> Tensor:
    return torch.cat([predict(batch).argmax(1) for batch in batches])


@torch.no_grad()
def _seconds(predict: Predict, batches: tuple[Tensor, ...]) -> float:
    _wait(batches[0])
    begun = time.perf_counter()
    for batch in batches:
        predict(batch)
    _wait(batches[0])
    return time.perf_counter() - begun


def _wait(inputs: Tensor) -> None:
    if inputs.is_cuda:
        torch.cuda.synchronize()
