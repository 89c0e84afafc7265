"""Noise transfer: give a small clean set the same kind of label noise as a large noisy one."""

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

from paperworks.data.labels import check_labels
from paperworks.data.noise import noisify
from paperworks.errors import UserError

FitPredict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(inputs, labels, held_out) -> predicted labels of held_out``: trains a fresh teacher and lets it label."""


class TransferredLabels(NamedTuple):
    """Labels of the clean set after transfer.

    Attributes:
        noisy: The labels with noise, a new tensor.
        is_clean: Where ``noisy`` is still the true label: what the detector learns.
    """

    noisy: Int[Tensor, " m"]
    is_clean: Bool[Tensor, " m"]


def estimate_transition(
    probs: Float[Tensor, "m classes"], labels: Int[Tensor, " m"], smoothing: float = 0.0
) -> Float[Tensor, "classes classes"]:
    r"""Estimate how labels are corrupted from a noisily trained model's predictions on clean examples.

    $$\hat T_{kj} = \frac{\sum_{i: y_i = k} p_j(x_i) + s / K}{m_k + s}$$

    the estimator of Gold Loss Correction (Hendrycks et al., 2018, eq. 1): the model was trained on the
    noisy labels, so that its mean prediction over clean examples of class k tells which labels that class
    was given. The model should be stopped before it memorises. With one-hot ``probs`` of noisy labels it is
    their confusion matrix.

    Args:
        probs: Predicted distributions over the K classes, one row an example.
        labels: The true labels y.
        smoothing: Pseudo-examples s a class that are spread evenly over the labels.

    Returns:
        A row-stochastic matrix. A class without examples gets the identity's row, with a warning.

    Raises:
        UserError: If a row of ``probs`` is no distribution, or a label is out of range.
    """
    num_classes = probs.shape[1]
    check_labels(labels, num_classes, "labels")
    _check_distributions(probs)
    if not smoothing >= 0:
        raise UserError(f"smoothing must not be negative, got {smoothing}")
    count = labels.bincount(minlength=num_classes).to(probs)[:, None]
    total = probs.new_zeros(num_classes, num_classes).index_add_(0, labels.long(), probs)
    rows = (total + smoothing / num_classes) / (count + smoothing)
    if (count == 0).any():
        missing = (count[:, 0] == 0).nonzero()[:, 0].tolist()
        warnings.warn(f"no example of class {missing}: its labels are taken to be right", stacklevel=2)
    rows = torch.where(count > 0, rows, torch.eye(num_classes).to(probs))
    return rows / rows.sum(1, keepdim=True)


def transfer_noise(
    labels: Int[Tensor, " m"],
    *,
    transition: Float[Tensor, "classes classes"] | None = None,
    probs: Float[Tensor, "m classes"] | None = None,
    generator: torch.Generator,
) -> TransferredLabels:
    r"""Draw noisy labels for clean examples: $\tilde y_j \sim T_{y_j}$, or $\tilde y_j \sim p(x_j)$.

    Args:
        labels: The true labels; left as they are.
        transition: Row-stochastic T, for noise that depends on the class alone.
        probs: Each example's own distribution, as a noisily trained model predicts it, for noise that
            depends on the input.
        generator: Source of all randomness.

    Raises:
        UserError: Unless exactly one of ``transition`` and ``probs`` is given, and is a set of distributions.
    """
    if (transition is None) == (probs is None):
        raise UserError("pass either transition or probs, " + ("got none" if probs is None else "got both"))
    if transition is not None:
        drawn = noisify(labels, "transition", None, len(transition), generator, transition=transition)
        return TransferredLabels(drawn.noisy, ~drawn.is_noisy)
    assert probs is not None
    check_labels(labels, probs.shape[1], "labels")
    if len(probs) != len(labels):
        raise UserError(f"probs must have a row for each of the {len(labels)} labels, got {len(probs)}")
    _check_distributions(probs)
    noisy = torch.multinomial(probs.to(generator.device), 1, generator=generator).squeeze(1).to(labels)
    return TransferredLabels(noisy, noisy == labels)


def transfer_pseudo_label_noise(
    fit_predict: FitPredict,
    inputs: Tensor,
    labels: Int[Tensor, " m"],
    *,
    folds: int = 4,
    generator: torch.Generator,
) -> TransferredLabels:
    """Make pseudo-label noise on the clean set in the way it arose: teachers label what they were not trained on.

    A teacher that labelled its own training examples would make hardly any mistake there, and the detector
    would have nothing to learn.

    Args:
        fit_predict: Trains a fresh teacher on ``(inputs, labels)`` and returns its labels of a third
            argument.
        inputs: Inputs of the clean set, one row an example.
        labels: The true labels; left as they are.
        folds: Parts F of the clean set, each labelled by a teacher trained on the others.
        generator: Decides the folds.

    Raises:
        UserError: If ``folds`` is not from 2 to the number of examples, or the teacher's labels are not
            labels.
    """
    if not 2 <= folds <= len(labels):
        raise UserError(f"folds must be from 2 to the {len(labels)} clean examples, got {folds}")
    noisy = torch.empty_like(labels)
    seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
    splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # A class with fewer examples than folds is in every training part, as long as it has two.
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        parts = list(splitter.split(labels.cpu(), labels.cpu()))
    for part, held_out in ((torch.from_numpy(a), torch.from_numpy(b)) for a, b in parts):
        predicted = fit_predict(inputs[part], labels[part], inputs[held_out])
        if predicted.shape != held_out.shape or predicted.is_floating_point():
            got = f"{predicted.dtype} {list(predicted.shape)}"
            raise UserError(f"fit_predict must return {len(held_out)} class indices, got {got}")
        noisy[held_out] = predicted.to(noisy)
    return TransferredLabels(noisy, noisy == labels)


def transcripts_match(noisy: Sequence[str], clean: Sequence[str], max_word_error: float = 0.0) -> Bool[Tensor, " m"]:
    """``is_clean`` for speech: whether each transcript's word error rate is at most ``max_word_error``.

    Args:
        noisy: Transcripts that are doubted, such as a recogniser's.
        clean: The true transcripts, one for each.
        max_word_error: Largest word error rate of a transcript that passes as right; 0 asks for equal words.

    Raises:
        UserError: If the numbers of transcripts differ, or a true one is empty.
    """
    from torchmetrics.functional.text import word_error_rate

    if len(noisy) != len(clean):
        raise UserError(f"each transcript needs its true one, got {len(noisy)} and {len(clean)}")
    empty = [row for row, transcript in enumerate(clean) if not transcript.split()]
    if empty:
        raise UserError(f"clean[{empty[0]}] is an empty transcript")
    rates = [float(word_error_rate(got, true)) for got, true in zip(noisy, clean, strict=True)]
    return torch.tensor(rates) <= max_word_error


def _check_distributions(probs: Tensor) -> None:
    wrong = ~(probs >= 0).all(1) | ~((probs.sum(1) - 1).abs() < 1e-3)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise UserError(f"probs[{row}] must be non-negative and sum to 1, its sum is {float(probs[row].sum()):.4g}")
