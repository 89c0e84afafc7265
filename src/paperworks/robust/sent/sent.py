"""SENT: transfer the noise to the clean set, learn there to tell wrong labels, filter the noisy set."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from sklearn.base import clone
from torch import Tensor, nn

from paperworks.data.labels import check_labels
from paperworks.errors import UserError, unknown
from paperworks.train.checkpoint import seeded

from .detector import NoisyLabelDetector, OneClassError
from .dynamics import DynamicsRecorder, RecordDynamics, centroid_cosine
from .fitting import AfterEpoch, Fit, PredictLogits, fit_with_trainer, predict_logits
from .transfer import TransferredLabels, estimate_transition, transfer_noise, transfer_pseudo_label_noise

NOISE = ("corruption", "pseudo-labels")


class Sets(NamedTuple):
    """The noisy set N and the clean set C."""

    noisy: Tensor
    clean: Tensor
    clean_labels: Tensor


class SENT:
    """Learns which labels of a large noisy set to trust, from a small clean one, and trains on those.

    A round has six steps: (1) find out what the noise is like and give the clean labels the same, so that one
    knows which of *those* are wrong; (2) train a fresh model on both sets with their noisy labels and
    record its predictions after every epoch; (3) make features of them; (4) train a detector on the clean
    set's; (5) keep the noisy examples whose labels it finds clean; (6) train from scratch on these and on
    the clean set with its true labels. No noise rate has to be known.

    Only the paper's abstract and introduction could be had: this is a reconstruction. Features and detector
    are those of a pilot on AG News.

    Args:
        make_model: Makes an untrained model; called while the global generators are seeded.
        num_classes: K.
        noise: How the noisy labels came about: ``"corruption"`` of true ones, or ``"pseudo-labels"`` of a
            teacher that was trained on the clean set (self-training).
        fit: Trains a model, see ``Fit``.
        predict_logits: ``(model, inputs) -> logits`` in evaluation mode.
        epochs: Epochs E of the feature run and of the final training.
        warmup_epochs: Epochs of the model that estimates corruption; ``epochs`` by default. Too few make the
            noise look larger than it is.
        transition: The corruption, row-stochastic, where it is known; else it is estimated.
        instance: Draw each clean example's label from the prediction for it, for noise that depends on the
            input.
        smoothing: Pseudo-examples a class in the estimate (``estimate_transition``).
        folds: Parts of the clean set that are pseudo-labelled by teachers trained on the others.
        teacher_epochs: Epochs of those teachers in the first round; ``epochs`` by default.
        detector: The classifier of step 4, with the threshold of step 5; ``NoisyLabelDetector()`` by default.
        soft: Train finally on the whole noisy set, each example weighted by its probability of being clean.
        summary: Add statistics over epochs to the features (``DynamicsRecorder.features``).
        embed: ``(model, inputs) -> embeddings``: add ``centroid_cosine`` at the last epoch to the features.
        rounds: How often to repeat all steps. In later rounds the final model replaces the first one: its
            predictions on the noisy set, held against the labels, tell the corruption; or become the labels.
        keep_all_if_clean: If the transferred noise changes no label, keep all instead of raising an error.
        seed: Decides everything random.

    Attributes:
        clean_probability_: Probability of being clean, for every noisy example, also the dropped ones.
        selected_: Which noisy examples were kept.
        noisy_labels_: The labels that were judged: those given, or the last round's pseudo-labels.
        transition_: The estimated (or given) corruption; None with pseudo-labels and with ``instance``.
        transferred_: The clean set's labels with noise, and which of them are right.
        recorder_: What was recorded: the noisy examples, then the clean ones.
        detector_: The fitted detector. Both are None if ``keep_all_if_clean`` applied.
        model_: The final model.

    Example:
        >>> sent = SENT(lambda: nn.Linear(784, 10), num_classes=10).fit(x, y_noisy, x_audited, y_audited)
        >>> suspicious = sent.clean_probability_.argsort()[:100]
        >>> classes = sent.predict(x_test)
    """

    transition_: Float[Tensor, "classes classes"] | None
    transferred_: TransferredLabels
    recorder_: DynamicsRecorder | None
    detector_: NoisyLabelDetector | None
    clean_probability_: Float[Tensor, " n"]
    selected_: Bool[Tensor, " n"]
    noisy_labels_: Int[Tensor, " n"]
    model_: nn.Module

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        num_classes: int,
        *,
        noise: str = "corruption",
        fit: Fit = fit_with_trainer,
        predict_logits: PredictLogits = predict_logits,
        epochs: int = 8,
        warmup_epochs: int | None = None,
        transition: Float[Tensor, "classes classes"] | None = None,
        instance: bool = False,
        smoothing: float = 0.0,
        folds: int = 4,
        teacher_epochs: int | None = None,
        detector: NoisyLabelDetector | None = None,
        soft: bool = False,
        summary: bool = False,
        embed: Callable[[nn.Module, Tensor], Tensor] | None = None,
        rounds: int = 1,
        keep_all_if_clean: bool = False,
        seed: int = 0,
    ) -> None:
        if noise not in NOISE:
            raise unknown("noise", noise, NOISE)
        if num_classes < 2:
            raise UserError(f"num_classes must be at least 2, got {num_classes}")
        self.make_model, self.num_classes, self.noise = make_model, num_classes, noise
        self.train, self.predict_logits = fit, predict_logits
        self.epochs, self.rounds, self.folds = epochs, rounds, folds
        self.warmup_epochs = epochs if warmup_epochs is None else warmup_epochs
        self.teacher_epochs = epochs if teacher_epochs is None else teacher_epochs
        for name in ("epochs", "warmup_epochs", "teacher_epochs", "rounds"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if transition is not None and transition.shape != (num_classes, num_classes):
            expected = [num_classes, num_classes]
            raise UserError(f"transition must be {expected}, got {list(transition.shape)}")
        if (instance or transition is not None) and noise != "corruption":
            raise UserError("transition and instance describe corruption: they exclude noise='pseudo-labels'")
        if instance and (transition is not None or rounds > 1):
            raise UserError("instance=True is noise by input, transition and later rounds are noise by class")
        self.transition, self.instance, self.smoothing = transition, instance, smoothing
        self.detector, self.soft, self.summary, self.embed = detector, soft, summary, embed
        self.keep_all_if_clean, self.seed = keep_all_if_clean, seed

    def fit(
        self,
        X_noisy: Tensor,
        y_noisy: Int[Tensor, " n"] | None,
        X_clean: Tensor,
        y_clean: Int[Tensor, " m"],
        *,
        allow_equal: bool = False,
        after_round: Callable[["SENT"], None] | None = None,
    ) -> "SENT":
        """Judge the noisy labels and train the final model. The labels given are not changed.

        Args:
            X_noisy: Inputs of the noisy set, one row an example.
            y_noisy: Their labels. None, with ``noise="pseudo-labels"``: a teacher trained on the clean set
                labels them.
            X_clean: Inputs of the clean set.
            y_clean: Their true labels, at least two of each class.
            allow_equal: Let inputs of the clean set occur in the noisy set too.
            after_round: Called after each round, for instance to measure the model.

        Raises:
            UserError: If labels are out of range, a class has fewer than two clean examples, an example is in
                both sets, or no example is kept.
            OneClassError: If the transferred noise leaves nothing to tell apart.
        """
        sets = self._begin(X_noisy, y_noisy, X_clean, y_clean, allow_equal)
        for repetition in range(self.rounds):
            self._judge(sets, y_noisy, repetition)
            self._train_final(sets)
            if after_round is not None:
                after_round(self)
        return self

    def detect(
        self,
        X_noisy: Tensor,
        y_noisy: Int[Tensor, " n"] | None,
        X_clean: Tensor,
        y_clean: Int[Tensor, " m"],
        *,
        allow_equal: bool = False,
    ) -> "SENT":
        """Judge the noisy labels as the first round of ``fit`` does, and train no final model.

        Arguments and errors are those of ``fit``; all attributes but ``model_`` are there afterwards.
        """
        self._judge(self._begin(X_noisy, y_noisy, X_clean, y_clean, allow_equal), y_noisy, 0)
        return self

    def predict(self, X: Tensor) -> Int[Tensor, " n"]:
        """The final model's classes."""
        return self.predict_logits(self.model_, X).argmax(1)

    def _begin(
        self, inputs: Tensor, labels: Tensor | None, clean: Tensor, clean_labels: Tensor, allow_equal: bool
    ) -> Sets:
        self._check(inputs, labels, clean, clean_labels, allow_equal)
        self._generator = torch.Generator().manual_seed(self.seed)
        return Sets(inputs, clean, clean_labels)

    def _judge(self, sets: Sets, labels: Tensor | None, repetition: int) -> None:
        """Steps 1 to 5."""
        if self.noise == "pseudo-labels":
            self._transfer_pseudo_labels(sets, labels, repetition)
        else:
            assert labels is not None
            self._transfer_corruption(sets, labels, repetition)
        self._select(sets)

    # Step 1: the noise, and the clean set's share of it.

    def _transfer_corruption(self, sets: Sets, labels: Tensor, repetition: int) -> None:
        self.noisy_labels_, self.transition_, probs = labels, self.transition, None
        if self.transition is None and repetition == 0:
            model = self._fresh(sets.noisy, labels, self.warmup_epochs)
            probs = self.predict_logits(model, sets.clean).softmax(1)
            if not self.instance:
                self.transition_ = estimate_transition(probs, sets.clean_labels, self.smoothing)
        elif self.transition is None:
            given = nn.functional.one_hot(labels.long(), self.num_classes).float()
            self.transition_ = estimate_transition(given, self.predict(sets.noisy), self.smoothing)
        self.transferred_ = transfer_noise(
            sets.clean_labels,
            transition=self.transition_,
            probs=probs if self.instance else None,
            generator=self._generator,
        )

    def _transfer_pseudo_labels(self, sets: Sets, labels: Tensor | None, repetition: int) -> None:
        self.transition_ = None
        if repetition == 0:
            kept, kept_labels, epochs = sets.noisy[:0], sets.clean_labels[:0], self.teacher_epochs
            if labels is None:
                teacher = self._fresh(sets.clean, sets.clean_labels, epochs)
                labels = self.predict_logits(teacher, sets.noisy).argmax(1)
        else:
            kept, kept_labels = sets.noisy[self.selected_], self.noisy_labels_[self.selected_]
            epochs, labels = self.epochs, self.predict(sets.noisy)
        self.noisy_labels_ = labels

        def fit_predict(inputs: Tensor, labels: Tensor, held_out: Tensor) -> Tensor:
            model = self._fresh(torch.cat([kept, inputs]), torch.cat([kept_labels, labels]), epochs)
            return self.predict_logits(model, held_out).argmax(1)

        self.transferred_ = transfer_pseudo_label_noise(
            fit_predict, sets.clean, sets.clean_labels, folds=self.folds, generator=self._generator
        )

    # Steps 2 to 5: features, detector, selection.

    def _select(self, sets: Sets) -> None:
        is_clean, n = self.transferred_.is_clean, len(sets.noisy)
        self.detector_ = self.recorder_ = None
        if is_clean.all() and self.keep_all_if_clean:
            self.clean_probability_, self.selected_ = torch.ones(n), torch.ones(n, dtype=torch.bool)
            return
        if is_clean.all() or not is_clean.any():
            changed = "none" if is_clean.all() else "all"
            raise OneClassError(
                f"the transferred noise changed {changed} of the {len(is_clean)} clean labels, so there is nothing "
                "to learn from; use more clean examples"
                + (", or pass keep_all_if_clean=True" if is_clean.all() else "")
            )
        inputs = torch.cat([sets.noisy, sets.clean])
        labels = torch.cat([self.noisy_labels_, self.transferred_.noisy.to(self.noisy_labels_)])
        self.recorder_ = DynamicsRecorder(labels, self.num_classes, self.epochs)
        record = RecordDynamics(inputs, self.recorder_, self.predict_logits)
        model = self._fresh(inputs, labels, self.epochs, after_epoch=record)
        if self.recorder_.epoch < self.epochs:
            times = f"{self.recorder_.epoch} times in {self.epochs} epochs"
            raise UserError(f"fit must call after_epoch(model) after every epoch, it did {times}")
        features = self.recorder_.features(summary=self.summary)
        if self.embed is not None:
            cosines = centroid_cosine(self.embed(model, inputs).to(features), labels, self.num_classes)
            features = torch.cat([features, cosines], dim=1)
        self._detect(features.cpu(), is_clean.cpu(), n)

    def _detect(self, features: Tensor, is_clean: Tensor, n: int) -> None:
        table = features.numpy()
        self.detector_ = clone(self.detector or NoisyLabelDetector()).fit(table[n:], is_clean.numpy())
        probability = torch.from_numpy(self.detector_.predict_proba(table[:n])[:, 1])
        threshold, device = self.detector_.threshold_, self.noisy_labels_.device
        self.clean_probability_ = probability.float().to(device)
        self.selected_ = (probability > threshold).to(device)
        if not self.selected_.any():
            raise UserError(
                f"no label is kept (0 % of {n}): none has a probability of being clean above the threshold "
                f"{threshold:.3g}, the largest is {float(probability.max()):.3g}; lower it with "
                "detector=NoisyLabelDetector(threshold=…)"
            )

    # Step 6.

    def _train_final(self, sets: Sets) -> None:
        kept = torch.ones_like(self.selected_) if self.soft else self.selected_
        inputs = torch.cat([sets.noisy[kept], sets.clean])
        labels = torch.cat([self.noisy_labels_[kept], sets.clean_labels.to(self.noisy_labels_)])
        certain = torch.ones(len(sets.clean), device=labels.device)
        weights = torch.cat([self.clean_probability_, certain]) if self.soft else None
        self.model_ = self._fresh(inputs, labels, self.epochs, weights=weights)

    def _fresh(
        self,
        inputs: Tensor,
        labels: Tensor,
        epochs: int,
        *,
        weights: Tensor | None = None,
        after_epoch: AfterEpoch | None = None,
    ) -> nn.Module:
        """A new model, trained; each has its own seed."""
        seed = int(torch.randint(2**31, (), generator=self._generator))
        with seeded(seed):
            model = self.make_model()
            self.train(model, inputs, labels, epochs=epochs, seed=seed, weights=weights, after_epoch=after_epoch)
        return model

    def _check(
        self, inputs: Tensor, labels: Tensor | None, clean: Tensor, clean_labels: Tensor, allow_equal: bool
    ) -> None:
        if labels is None and self.noise == "corruption":
            raise UserError("y_noisy is None, which is for noise='pseudo-labels'")
        for name, y, X in (("noisy", labels, inputs), ("clean", clean_labels, clean)):
            if y is not None:
                check_labels(y, self.num_classes, f"y_{name}")
                if len(y) != len(X):
                    raise UserError(f"y_{name} must have a label for each row of X_{name} ({len(X)}), got {len(y)}")
        if not len(inputs) or inputs.shape[1:] != clean.shape[1:]:
            got = f"{list(inputs.shape)} and {list(clean.shape)}"
            raise UserError(f"X_noisy and X_clean must hold examples of one shape, got {got}")
        count = clean_labels.long().bincount(minlength=self.num_classes)
        if count.min() < 2:
            got = f"{int(count.min())} of class {int(count.argmin())}"
            raise UserError(f"y_clean must have at least 2 examples of each class, got {got}")
        if not allow_equal and (shared := _shared(inputs, clean)):
            i, j = shared[0]
            raise UserError(
                f"{len(shared)} of {len(clean)} clean examples are in the noisy set too (X_clean[{j}] is "
                f"X_noisy[{i}]): take them out of it, or pass allow_equal=True if different examples can be equal"
            )


def _shared(inputs: Tensor, clean: Tensor) -> list[tuple[int, int]]:
    """Positions (in ``inputs``, in ``clean``) of the clean examples that occur in both."""
    where = {row.tobytes(): j for j, row in enumerate(clean.detach().cpu().numpy())}
    found: dict[int, int] = {}
    for i, row in enumerate(inputs.detach().cpu().numpy()):
        if (j := where.get(row.tobytes())) is not None:
            found.setdefault(j, i)
    return [(i, j) for j, i in sorted(found.items())]
