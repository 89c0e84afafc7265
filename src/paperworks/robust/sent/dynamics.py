"""Training dynamics: what a model says about every example and its label, epoch after epoch."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperworks.data.labels import check_labels
from paperworks.errors import UserError
from paperworks.train import Intervention, State

from .fitting import PredictLogits, predict_logits

STATISTICS = ("loss", "probability", "other", "margin", "entropy")
PADDING = -100


def label_statistics(
    logits: Float[Tensor, "*batch classes"], labels: Int[Tensor, "*batch"]
) -> Float[Tensor, "*batch 5"]:
    r"""Five numbers on a prediction $p = \mathrm{softmax}(z)$ and the label $\tilde y$ that is doubted.

    In the order of ``STATISTICS``: $-\log p_{\tilde y}$, $p_{\tilde y}$, $\max_{k \ne \tilde y} p_k$,
    $p_{\tilde y} - \max_{k \ne \tilde y} p_k$, and the entropy $-\sum_k p_k \log p_k$ (nats).

    Args:
        logits: z, in any floating type; computed in float32 at least.
        labels: Class indices.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    log_p = wide.log_softmax(-1)
    index = labels.long().unsqueeze(-1)
    own = log_p.gather(-1, index).squeeze(-1)
    other = log_p.scatter(-1, index, -torch.inf).amax(-1).exp()
    p = log_p.exp()
    return torch.stack([-own, own.exp(), other, own.exp() - other, torch.special.entr(p).sum(-1)], dim=-1)


class DynamicsRecorder:
    r"""Collects ``label_statistics`` of every example at the end of every epoch.

    Logits are reduced at once, so that memory is $5 E n$ numbers whatever the number of classes. Examples
    that a detector is to compare belong into one recorder: their features then have the same order.

    Args:
        labels: The labels that are doubted, ``[n]``; or ``[n, tokens]`` for sequences, whose statistics are
            averaged over the tokens. Tokens with the label ``PADDING`` do not count.
        num_classes: K.
        epochs: How many epochs E will be recorded.

    Example:
        >>> recorder = DynamicsRecorder(labels, num_classes=4, epochs=8)
        >>> for epoch in range(8):
        ...     train_one_epoch(model)
        ...     for index, x in loader:  # in eval mode, without gradients
        ...         recorder.update(index, model(x))
        ...     recorder.end_epoch()
        >>> recorder.features().shape
        torch.Size([n, 44])
    """

    def __init__(self, labels: Int[Tensor, "n *tokens"], num_classes: int, epochs: int) -> None:
        if epochs < 1:
            raise UserError(f"epochs must be at least 1, got {epochs}")
        if num_classes < 2:
            raise UserError(f"num_classes must be at least 2, got {num_classes}")
        if labels.ndim not in (1, 2):
            raise UserError(f"labels must be [n] or [n, tokens], got {list(labels.shape)}")
        self.mask = labels != PADDING if labels.ndim == 2 else None
        check_labels(labels if self.mask is None else labels[self.mask], num_classes, "labels")
        if self.mask is not None and not self.mask.any(1).all():
            raise UserError(f"labels[{int((~self.mask.any(1)).nonzero()[0])}] is padding only")
        self.labels, self.num_classes, self.epochs, self.epoch = labels, num_classes, epochs, 0
        self.statistics: Float[Tensor, "epochs n 5"] = torch.full(
            (epochs, len(labels), len(STATISTICS)), torch.nan, device=labels.device
        )

    def update(self, index: Int[Tensor, " batch"] | slice, logits: Float[Tensor, "batch *tokens classes"]) -> None:
        """Record the current epoch's logits of the examples at ``index``; a second time replaces the first.

        Raises:
            UserError: If logits are not finite or have the wrong shape, or all epochs are recorded already.
        """
        self._open()
        labels, device = self.labels[index], self.labels.device
        if logits.shape != (*labels.shape, self.num_classes):
            raise UserError(f"logits must be {[*labels.shape, self.num_classes]}, got {list(logits.shape)}")
        mask = None if self.mask is None else self.mask[index]
        logits = logits.detach().to(device)
        finite = logits.isfinite().all(-1)
        if mask is not None:
            finite |= ~mask
        if not finite.all():
            count = int((~finite.view(len(labels), -1).all(1)).sum())
            raise UserError(f"logits of {count} example(s) are not finite at epoch {self.epoch}")
        if mask is None:
            found = label_statistics(logits, labels)
        else:
            found = label_statistics(logits.nan_to_num(0.0), labels.clamp(min=0))
            found = torch.where(mask[..., None], found, 0.0).sum(1) / mask.sum(1, keepdim=True)
        self.statistics[self.epoch, index] = found.to(self.statistics)

    def end_epoch(self) -> None:
        """Close the epoch.

        Raises:
            UserError: If examples are missing.
        """
        self._open()
        missing = self.statistics[self.epoch, :, 0].isnan()
        if missing.any():
            count = f"{int(missing.sum())} of {len(missing)} examples"
            raise UserError(f"{count} were not recorded at epoch {self.epoch}")
        self.epoch += 1

    def statistic(self, name: str) -> Float[Tensor, "epochs n"]:
        """One of ``STATISTICS`` over the epochs recorded."""
        self._complete()
        return self.statistics[:, :, STATISTICS.index(name)]

    def features(self, *, summary: bool = False) -> Float[Tensor, "n features"]:
        """Everything recorded, one row an example: 5 statistics of epoch 0, of epoch 1 …, then the label as one-hot.

        Sequences have no one-hot part.

        Args:
            summary: Append, before the one-hot part, the share of epochs in which the label was the model's
                choice and the standard deviation of its probability over epochs.

        Raises:
            UserError: If epochs are missing.
        """
        self._complete()
        parts = [self.statistics.transpose(0, 1).flatten(1)]
        if summary:
            chosen = self.statistic("margin") >= 0
            parts += [
                chosen.float().mean(0)[:, None],
                self.statistic("probability").std(0, correction=0)[:, None],
            ]
        if self.mask is None:
            parts.append(nn.functional.one_hot(self.labels.long(), self.num_classes).float())
        return torch.cat(parts, dim=1)

    def _open(self) -> None:
        if self.epoch == self.epochs:
            raise UserError(f"all {self.epochs} epochs are recorded already")

    def _complete(self) -> None:
        if self.epoch < self.epochs:
            raise UserError(f"only {self.epoch} of {self.epochs} epochs are recorded")

    def state_dict(self) -> dict[str, Any]:
        """What is recorded so far."""
        return {"epoch": self.epoch, "statistics": self.statistics}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken."""
        self.epoch = state_dict["epoch"]
        self.statistics.copy_(state_dict["statistics"])


class RecordDynamics(Intervention):
    """Fills a recorder at the end of each epoch: of a ``Trainer``'s run, or of any loop that calls it with the model.

    The inputs are passed over in order, in evaluation mode and without gradients; training is not changed.

    Args:
        inputs: The recorder's examples, in its order.
        recorder: What to fill; its ``epochs`` must be the run's.
        predict: ``(model, inputs) -> logits``, if not the model's own output.

    Example:
        >>> record = RecordDynamics(images, DynamicsRecorder(labels, num_classes=10, epochs=8))
        >>> Trainer(epochs=8, interventions=[record]).fit(model, train_data, loss=loss, optimizer=optimizer)
        >>> record.recorder.statistic("loss").mean(0)  # wrong labels are learned last
    """

    def __init__(self, inputs: Tensor, recorder: DynamicsRecorder, predict: PredictLogits = predict_logits) -> None:
        if len(inputs) != len(recorder.labels):
            raise UserError(f"inputs must be the recorder's {len(recorder.labels)} examples, got {len(inputs)}")
        self.inputs, self.recorder, self.predict = inputs, recorder, predict

    def __call__(self, model: nn.Module) -> None:
        """Record one epoch."""
        self.recorder.update(slice(None), self.predict(model, self.inputs))
        self.recorder.end_epoch()

    def setup(self, state: State) -> None:
        if state.epochs != self.recorder.epochs:
            raise UserError(f"the recorder expects {self.recorder.epochs} epochs, the run has {state.epochs}")

    def on_epoch_end(self, state: State) -> None:
        with state.fabric.autocast():
            self(state.module)

    def state_dict(self) -> dict[str, Any]:
        return self.recorder.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.recorder.load_state_dict(state_dict)


def centroid_cosine(
    embeddings: Float[Tensor, "n width"], labels: Int[Tensor, " n"], num_classes: int
) -> Float[Tensor, "n 2"]:
    r"""Cosine of each embedding to its label's centroid, and to the nearest centroid of another class.

    Centroids are the means of the unit embeddings that bear the label, right or wrong. A class without
    examples is nobody's nearest.
    """
    check_labels(labels, num_classes, "labels")
    unit = nn.functional.normalize(embeddings.float(), dim=1)
    sums = unit.new_zeros(num_classes, unit.shape[1]).index_add_(0, labels.long(), unit)
    cosine = unit @ nn.functional.normalize(sums, dim=1).T
    empty = labels.bincount(minlength=num_classes) == 0
    own = cosine.gather(1, labels.long()[:, None])
    others = cosine.masked_fill(empty, -1.0).scatter(1, labels.long()[:, None], -1.0)
    return torch.cat([own, others.amax(1, keepdim=True)], dim=1)
