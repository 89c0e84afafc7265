"""How SENT trains and asks the models it is given: a protocol of two callables, and its form on our trainer."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.utils.data import TensorDataset

from paperworks.nn import keeping_modes
from paperworks.train import Intervention, State, Trainer

AfterEpoch = Callable[[nn.Module], None]
"""Called with the model at the end of each epoch."""

PredictLogits = Callable[[nn.Module, Tensor], Tensor]
"""``(model, inputs) -> logits [n, classes]``, in evaluation mode and without gradients."""


ADAM = partial(Adam, lr=1e-3)
TRAINER = partial(Trainer, batch_size=64)


@runtime_checkable
class Fit(Protocol):
    """Trains a model in place."""

    def __call__(
        self,
        model: nn.Module,
        inputs: Tensor,
        labels: Tensor,
        *,
        epochs: int,
        seed: int,
        weights: Tensor | None = None,
        after_epoch: AfterEpoch | None = None,
    ) -> None:
        """Train ``model`` on ``(inputs, labels)``.

        Args:
            model: Trained in place.
            inputs: Inputs, one row an example.
            labels: Class indices.
            epochs: Passes over the examples.
            seed: Decides the order of the batches and dropout.
            weights: Weight of each example in the loss; None is 1.
            after_epoch: If given, to be called with the model after every epoch.
        """


def fit_with_trainer(
    model: nn.Module,
    inputs: Tensor,
    labels: Int[Tensor, " n"],
    *,
    epochs: int,
    seed: int,
    weights: Float[Tensor, " n"] | None = None,
    after_epoch: AfterEpoch | None = None,
    optimizer: Callable[[Iterator[nn.Parameter]], Optimizer] = ADAM,
    trainer: Callable[..., Trainer] = TRAINER,
    interventions: Iterable[Intervention] = (),
) -> None:
    """``Fit`` by cross entropy on a ``Trainer``; with weights, by the batch's mean of weight times cross entropy.

    Args:
        model: See ``Fit``.
        inputs: See ``Fit``.
        labels: See ``Fit``.
        epochs: See ``Fit``.
        seed: See ``Fit``.
        weights: See ``Fit``.
        after_epoch: See ``Fit``; an ``Intervention`` also takes part in the trainer's checkpoints.
        optimizer: How to make an optimizer from parameters.
        trainer: How to make a ``Trainer`` from ``epochs``, ``seed`` and ``interventions``.
        interventions: Other methods that take part in every training run.

    Example:
        >>> fit = partial(fit_with_trainer, trainer=partial(Trainer, batch_size=128), interventions=[LogitClip()])
    """
    parts = [*interventions]
    if weights is not None:
        parts.append(_Weighted())
    if after_epoch is not None:
        parts.append(after_epoch if isinstance(after_epoch, Intervention) else _AfterEpoch(after_epoch))
    columns = (inputs, labels) if weights is None else (inputs, labels, weights)
    trainer(epochs=epochs, seed=seed, interventions=parts).fit(
        model, TensorDataset(*columns), loss=nn.functional.cross_entropy, optimizer=optimizer
    )


@torch.no_grad()
def predict_logits(model: nn.Module, inputs: Tensor, batch_size: int = 1024) -> Float[Tensor, "n classes"]:
    """The model's outputs in evaluation mode, without gradients, on the device of ``inputs``."""
    parameter = next(model.parameters(), inputs)
    with keeping_modes(model):
        model.eval()
        parts = torch.split(inputs, batch_size)
        outputs = [model(part.to(parameter.device)).to(inputs.device) for part in parts]
    return torch.cat(outputs)


class _AfterEpoch(Intervention):
    def __init__(self, call: AfterEpoch) -> None:
        self.call = call

    def on_epoch_end(self, state: State) -> None:
        self.call(state.module)


class _Weighted(Intervention):
    """Cross entropy in which each example has the weight that the dataset yields beside it."""

    def compute_loss(self, state: State, next: Callable[[State], Tensor]) -> Tensor:
        (weights,) = state.extra
        return (nn.functional.cross_entropy(state.outputs, state.targets, reduction="none") * weights).mean()
