"""From a small clean set, SENT learns which labels of a large noisy set to trust: training on those is at least
8 points more accurate than training on all of them at 40 % wrong labels (symmetric or pair flips) and 1 point under
self-training, and it ranks labels better than their mean loss does (AUC + 0.03 symmetric, + 0.06 pair).

Data are AG News' test split (TF-IDF words, one hidden layer), or scikit-learn's digits where it is not on this
machine; the artefact ``data`` says which. Each seed draws anew the test set, the clean set and the noisy set, the noise
and every network's start. All arms train with one optimizer, one learning rate and one number of epochs; arms that have
the clean set only get as many *steps* as training on all. Nothing is tuned on these draws, neither for SENT nor for its
neighbours; epochs were chosen on other seeds, long enough for wrong labels to be memorised. Every arm but ``clean``
trains finally on what it keeps of the noisy set and on the clean set. ``small-loss`` ranks by the mean loss in SENT's
own feature run, ``small-loss+clean`` in a run on the clean set's true labels; both are told the true noise rate.
``uniform`` is SENT that transfers symmetric noise of the true rate, ``oracle`` knows the wrong labels.
``confident-learning`` ranks by 3-fold held-out predictions, which makes it as costly as SENT.

What is known not to hold: under pair flips SENT is no better than the clean set alone with 400 examples, nor than
confident learning, and transferring the wrong (symmetric) noise there does not make its ranking worse. On pseudo-labels
small-loss selection, given the rate, is its equal. ``small-loss+clean`` ranks nearly as well as SENT. Where wrong
labels crowd at the class boundaries, the detector ranks hardly better than the mean loss, and ``instance=True`` raises
the precision of what is kept.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from pydantic import Field
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam
from torch.utils.data import TensorDataset

from paperworks.bench import Gain, Run, Task, claim, scaled
from paperworks.claims.images import ImageSettings
from paperworks.data import noisify, split
from paperworks.data.speech import load_spoken_digits
from paperworks.data.text import has_ag_news, load_text
from paperworks.robust.sent import (
    SENT,
    DynamicsRecorder,
    RecordDynamics,
    confident,
    confident_learning,
    fit_with_trainer,
    predict_logits,
    small_loss,
)
from paperworks.train import Intervention, Trainer

CORRUPTION = ("symmetric", "pair")
FOLDS = 3


class SentSettings(ImageSettings):
    """What the arms share."""

    data: str = scaled(
        smoke="digits",
        quick="auto",
        full="auto",
        description="ag_news, a CSV or TSV of texts, digits or other images; auto: ag_news if it is there, else digits",
    )
    text: str | None = Field(None, description="the column of texts in a table")
    target: str | None = Field(None, description="the column of labels in a table")
    train: int = scaled(smoke=300, quick=2000, full=5000, ge=50, description="noisy examples, at most")
    clean: int = scaled(smoke=80, quick=400, full=400, ge=4, description="clean examples, at most")
    labelled: int = scaled(smoke=50, quick=100, full=100, ge=4, description="clean examples under self-training")
    test: int = scaled(smoke=400, quick=2200, full=2200, ge=50, description="test examples, at most")
    words: int = scaled(smoke=500, quick=2000, full=4000, ge=10, description="vocabulary of the texts")
    rate: float = Field(0.4, gt=0, lt=1, description="share of wrong labels")
    epochs: int = scaled(smoke=4, quick=16, full=8, ge=1, description="passes over the training data")
    batch_size: int = Field(64, ge=2, description="examples a step")
    lr: float = Field(1e-3, gt=0, description="Adam's learning rate")
    rounds: int = scaled(smoke=1, quick=1, full=3, ge=1, description="rounds of SENT")
    more_rates: tuple[float, ...] = scaled(smoke=(), quick=(), full=(0.2, 0.6), description="further noise rates")
    more_clean: tuple[int, ...] = scaled(smoke=(), quick=(), full=(50, 100), description="further clean sets")
    speech: bool = scaled(smoke=False, quick=False, full=True, description="also self-training on spoken digits")


@dataclass(frozen=True)
class Problem:
    """A noisy set with its (secret) true labels, a clean set, a test set, and what to train on them."""

    name: str
    noisy: Tensor
    labels: Tensor
    truth: Tensor
    clean: Tensor
    clean_labels: Tensor
    test: Tensor
    test_labels: Tensor
    num_classes: int
    make_model: Callable[[], nn.Module]
    teacher: Tensor | None = None  # the probabilities that pseudo-labels come from
    rounds: int = 1

    @property
    def right(self) -> Tensor:
        return self.labels == self.truth

    @property
    def sets(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.noisy, self.labels, self.clean, self.clean_labels

    def small_epochs(self, epochs: int) -> int:
        """Epochs on the clean set that make as many steps as ``epochs`` on everything."""
        return ceil(epochs * (len(self.noisy) + len(self.clean)) / len(self.clean))

    def training_set(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """The examples kept and the clean ones, with their labels."""
        return torch.cat([self.noisy[kept], self.clean]), torch.cat([self.labels[kept], self.clean_labels])


class Outcome(NamedTuple):
    """What an arm keeps, how it ranks (also by the last loss), its final model if it has one already."""

    kept: Tensor
    score: Tensor | None = None
    model: nn.Module | None = None
    last: Tensor | None = None
    recorder: DynamicsRecorder | None = None


class Bench:
    """How every arm of a trial trains."""

    def __init__(self, run: Run, settings: SentSettings) -> None:
        self.run, self.settings = run, settings
        trainer = partial(Trainer, batch_size=settings.batch_size, accelerator=run.device)
        self.fit = partial(fit_with_trainer, optimizer=partial(Adam, lr=settings.lr), trainer=trainer)

    def train(
        self,
        make_model: Callable[[], nn.Module],
        inputs: Tensor,
        labels: Tensor,
        epochs: int,
        record: RecordDynamics | None = None,
    ) -> nn.Module:
        torch.manual_seed(self.run.seed)  # the same start for every arm
        model = make_model()
        self.fit(model, inputs, labels, epochs=epochs, seed=self.run.seed, after_epoch=record)
        return model

    def sent(self, problem: Problem, transition: Tensor | None = None) -> SENT:
        return SENT(
            problem.make_model,
            problem.num_classes,
            noise="corruption" if problem.teacher is None else "pseudo-labels",
            transition=transition,
            fit=self.fit,
            epochs=self.settings.epochs,
            teacher_epochs=problem.small_epochs(self.settings.epochs),
            rounds=problem.rounds,
            keep_all_if_clean=problem.teacher is not None,  # a teacher may be right everywhere
            seed=self.run.seed,
        )

    def accuracy(self, model: nn.Module, problem: Problem) -> float:
        return float((predict_logits(model, problem.test).argmax(1) == problem.test_labels).float().mean())


# The arms: which noisy examples to train on, beside the clean ones.


def keep_all(bench: Bench, problem: Problem) -> Outcome:
    return Outcome(torch.ones_like(problem.right))


def keep_none(bench: Bench, problem: Problem) -> Outcome:
    epochs = problem.small_epochs(bench.settings.epochs)
    model = bench.train(problem.make_model, problem.clean, problem.clean_labels, epochs)
    return Outcome(torch.zeros_like(problem.right), model=model)


def keep_right(bench: Bench, problem: Problem) -> Outcome:
    return Outcome(problem.right)


def keep_small_loss(bench: Bench, problem: Problem) -> Outcome:
    """By the losses in SENT's own feature run, so that ranking is all that differs."""
    sent = bench.sent(problem).detect(*problem.sets, allow_equal=True)
    return by_loss(problem, sent.recorder_) if sent.recorder_ else keep_all(bench, problem)


def keep_small_loss_with_clean(bench: Bench, problem: Problem) -> Outcome:
    """By the losses in a run on the clean set's true labels, which SENT forgoes there."""
    everything, epochs = torch.ones_like(problem.right), bench.settings.epochs
    recorder = DynamicsRecorder(problem.labels, problem.num_classes, epochs)
    record = RecordDynamics(problem.noisy, recorder)
    bench.train(problem.make_model, *problem.training_set(everything), epochs, record)
    return by_loss(problem, recorder)


def by_loss(problem: Problem, recorder: DynamicsRecorder) -> Outcome:
    losses = recorder.statistic("loss")[:, : len(problem.noisy)]
    kept = small_loss(losses.mean(0), float(problem.right.float().mean()))
    return Outcome(kept, -losses.mean(0), last=-losses[-1])


def keep_counted(bench: Bench, problem: Problem) -> Outcome:
    probs = torch.empty(len(problem.noisy), problem.num_classes)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=bench.run.seed)
    for part, held_out in folds.split(problem.labels, problem.labels):
        inputs = torch.cat([problem.noisy[part], problem.clean])
        labels = torch.cat([problem.labels[part], problem.clean_labels])
        model = bench.train(problem.make_model, inputs, labels, bench.settings.epochs)
        probs[held_out] = predict_logits(model, problem.noisy[held_out]).softmax(1)
    own = probs.gather(1, problem.labels[:, None]).squeeze(1)
    return Outcome(confident_learning(probs, problem.labels), own)


def keep_confident(bench: Bench, problem: Problem) -> Outcome:
    assert problem.teacher is not None
    return Outcome(confident(problem.teacher, 0.9), problem.teacher.amax(1))


def keep_trusted(bench: Bench, problem: Problem, *, uniform: bool = False) -> Outcome:
    k, wrong = problem.num_classes, 1 - float(problem.right.float().mean())
    symmetric = torch.full((k, k), wrong / (k - 1)).fill_diagonal_(1 - wrong)
    sent = bench.sent(problem, transition=symmetric if uniform else None)
    accuracies: list[float] = []
    # Two short texts may share all the words that are in the vocabulary.
    sent.fit(
        *problem.sets,
        allow_equal=True,
        after_round=lambda s: accuracies.append(bench.accuracy(s.model_, problem)),
    )
    if problem.rounds > 1:
        for repetition, accuracy in enumerate(accuracies, 1):
            bench.run.log(repetition, **{f"{problem.name}: accuracy after round": accuracy})
    if sent.noisy_labels_ is not problem.labels:  # later rounds judge other pseudo-labels than the first
        return Outcome(sent.selected_, model=sent.model_)
    return Outcome(sent.selected_, sent.clean_probability_, sent.model_, recorder=sent.recorder_)


ARMS: dict[str, Callable[[Bench, Problem], Outcome]] = {
    "all": keep_all,
    "clean": keep_none,
    "small-loss": keep_small_loss,
    "small-loss+clean": keep_small_loss_with_clean,
    "confident-learning": keep_counted,
    "confidence-0.9": keep_confident,
    "uniform": partial(keep_trusted, uniform=True),
    "sent": keep_trusted,
    "oracle": keep_right,
}
ONLY = {"confident-learning": "corruption", "uniform": "corruption", "confidence-0.9": "pseudo-labels"}


# The problems.


class Material(NamedTuple):
    """Inputs and true labels of the three sets, and what they are."""

    name: str
    sets: dict[str, tuple[Tensor, Tensor]]
    num_classes: int
    make_model: Callable[[], nn.Module]


def material(run: Run, settings: SentSettings) -> Material:
    source = settings.data
    if source == "auto":
        source = "ag_news" if has_ag_news(run.data_root) else "digits"
    if source == "ag_news" or {".csv", ".tsv"} & set(Path(source).suffixes):
        found = load_text(source, text=settings.text, target=settings.target, root=run.data_root)
        targets, classes, inputs = found.targets, len(found.classes), None
    else:
        images = settings.model_copy(update={"data": source}).images(run)
        targets, classes, inputs = images.targets, images.num_classes, images.inputs
    total = len(targets)
    sizes = {"test": min(settings.test, int(0.29 * total)), "clean": min(settings.clean, total // 18)}
    sizes["noisy"] = min(settings.train, total - sum(sizes.values()))
    rows = dict(zip(sizes, split(targets, list(sizes.values()), run.seed), strict=True))
    if inputs is None:
        tables = words({part: [found.texts[i] for i in index.tolist()] for part, index in rows.items()}, settings.words)
    else:
        tables = {part: inputs[index] for part, index in rows.items()}
    sets = {part: (tables[part], targets[index]) for part, index in rows.items()}
    width = tables["noisy"][0].numel()
    return Material(source, sets, classes, partial(perceptron, width, classes))


def words(texts: dict[str, list[str]], vocabulary: int) -> dict[str, Tensor]:
    """TF-IDF rows, of the words of the training texts."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(max_features=vocabulary, sublinear_tf=True).fit(texts["noisy"] + texts["clean"])
    return {part: torch.from_numpy(vectorizer.transform(texts[part]).toarray()).float() for part in texts}


def perceptron(width: int, num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(width, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, num_classes))


def listener() -> nn.Module:
    """A small network for log-mel pictures: averaged over time at the end, not over frequency."""
    layers: list[nn.Module] = []
    for before, after in pairwise((1, 16, 32, 64)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d((5, 1)), nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 5, 10))


def problems(run: Run, settings: SentSettings) -> Iterator[tuple[str, Callable[[], Problem]]]:
    """Names of the problems, and how to make each."""
    found = material(run, settings)
    run.save("data", {"data": found.name} | {part: len(y) for part, (_, y) in found.sets.items()})
    corrupt, pseudo = partial(corruption, run, found), partial(self_training, run, settings, found)
    most, first = len(found.sets["clean"][1]), settings.rounds
    for kind in CORRUPTION:
        yield kind, partial(corrupt, kind, kind, settings.rate, most, first)
        for rate in settings.more_rates:
            name = f"{kind}_{rate:.0%}".rstrip("%")
            yield name, partial(corrupt, name, kind, rate, most)
        for clean in settings.more_clean:
            yield f"{kind}_m{clean}", partial(corrupt, f"{kind}_m{clean}", kind, settings.rate, clean)
    yield "self", partial(pseudo, "self", min(settings.labelled, most), first)
    for clean in {*settings.more_clean, most} - {settings.labelled} if settings.more_clean else ():
        yield f"self_m{clean}", partial(pseudo, f"self_m{clean}", clean)
    if settings.speech:
        yield "speech", partial(speech, run, settings)


def corruption(run: Run, found: Material, name: str, kind: str, rate: float, clean: int, rounds: int = 1) -> Problem:
    noisy, truth = found.sets["noisy"]
    labels = noisify(truth, kind, rate, found.num_classes, run.generator("noise", kind, rate)).noisy
    return Problem(
        name,
        noisy,
        labels,
        truth,
        *first_of(found.sets["clean"], clean, run.seed),
        *found.sets["test"],
        found.num_classes,
        found.make_model,
        rounds=rounds,
    )


def self_training(run: Run, settings: SentSettings, found: Material, name: str, clean: int, rounds: int = 1) -> Problem:
    """Pseudo-labels of a teacher that was trained on the clean set."""
    noisy, truth = found.sets["noisy"]
    known = first_of(found.sets["clean"], clean, run.seed)
    problem = Problem(name, noisy, truth, truth, *known, *found.sets["test"], found.num_classes, found.make_model)
    epochs = problem.small_epochs(settings.epochs)
    teacher = Bench(run, settings).train(found.make_model, *known, epochs)
    probs = predict_logits(teacher, noisy).softmax(1)
    return Problem(
        name,
        noisy,
        probs.argmax(1),
        truth,
        *known,
        *found.sets["test"],
        found.num_classes,
        found.make_model,
        teacher=probs,
        rounds=rounds,
    )


def speech(run: Run, settings: SentSettings) -> Problem:
    """Spoken digits: one speaker is the test set, a few clips of the others are labelled."""
    clips = load_spoken_digits(root=run.data_root)
    held_out = clips.speakers == run.seed % len(clips.names)
    inputs, targets = clips.inputs[~held_out], clips.targets[~held_out]
    clean, noisy = split(targets, (settings.labelled, len(targets) - settings.labelled), run.seed)
    sets = {
        "noisy": (inputs[noisy], targets[noisy]),
        "clean": (inputs[clean], targets[clean]),
        "test": (clips.inputs[held_out], clips.targets[held_out]),
    }
    return self_training(run, settings, Material("spoken-digits", sets, 10, listener), "speech", settings.labelled)


def first_of(labelled: tuple[Tensor, Tensor], size: int, seed: int) -> tuple[Tensor, Tensor]:
    inputs, targets = labelled
    if size == len(targets):
        return labelled
    (rows,) = split(targets, (size,), seed)
    return inputs[rows], targets[rows]


@claim(
    "sent",
    arms=list(ARMS),
    expects=[
        Gain("symmetric_accuracy", "sent", over="all", at_least=0.08),
        Gain("pair_accuracy", "sent", over="all", at_least=0.08),
        Gain("symmetric_auc", "sent", over="small-loss", at_least=0.03),
        Gain("pair_auc", "sent", over="small-loss", at_least=0.06),
        Gain("self_accuracy", "sent", over="all", at_least=0.01),
    ],
    seeds={"quick": 4},
)
def trial(run: Run, arm: str, settings: SentSettings) -> dict[str, float]:
    bench, figures, selections, shown = Bench(run, settings), {}, {}, []
    todo = list(problems(run, settings))
    for place, (name, make) in enumerate(todo):
        run.progress(place / len(todo), name)
        problem = make()
        if ONLY.get(arm) not in (None, "corruption" if problem.teacher is None else "pseudo-labels"):
            continue
        outcome = ARMS[arm](bench, problem)
        model = outcome.model or bench.train(problem.make_model, *problem.training_set(outcome.kept), settings.epochs)
        figures[f"{name}_accuracy"] = bench.accuracy(model, problem)
        if outcome.score is not None and not problem.right.all():
            figures[f"{name}_auc"] = float(roc_auc_score(problem.right, outcome.score))
        if outcome.last is not None and not problem.right.all():
            figures[f"{name}_last_loss_auc"] = float(roc_auc_score(problem.right, outcome.last))
        selections[name] = selection(problem, outcome.kept)
        if outcome.recorder is not None and arm == "sent":
            log_dynamics(run, problem, outcome.recorder)
            shown.append((problem, outcome))
    run.save("selections", selections)
    if run.seed == 0 and shown:
        run.figure("scores", draw(shown))
    return figures


def selection(problem: Problem, kept: Tensor) -> dict[str, float | None]:
    right = problem.right
    return {
        "wrong": 1 - float(right.float().mean()),
        "kept": float(kept.float().mean()),
        "right among kept": float(right[kept].float().mean()) if kept.any() else None,
        "kept among right": float(kept[right].float().mean()),
    }


def log_dynamics(run: Run, problem: Problem, recorder: DynamicsRecorder) -> None:
    losses = recorder.statistic("loss")[:, : len(problem.noisy)]
    for epoch, loss in enumerate(losses, 1):
        run.log(epoch, **{f"{problem.name}: AUC of the loss at epoch": float(roc_auc_score(problem.right, -loss))})


def draw(shown: list[tuple[Problem, Outcome]]) -> Figure:
    """For each problem: the detector's probabilities of right and wrong labels, and ROC curves beside the loss."""
    figure = Figure(figsize=(8, 2.6 * len(shown)), layout="constrained")
    for row, (problem, outcome) in zip(figure.subplots(len(shown), 2, squeeze=False), shown, strict=True):
        assert outcome.score is not None
        assert outcome.recorder is not None
        right, losses = problem.right, outcome.recorder.statistic("loss")[:, : len(problem.noisy)]
        bins = torch.linspace(0, 1, 26).tolist()
        row[0].hist(outcome.score[right], bins, alpha=0.6, color="#2a9d5c", label="right")
        row[0].hist(outcome.score[~right], bins, alpha=0.6, color="#c8414b", label="wrong")
        row[0].axvline(0.5, color="#5b6470", linestyle="--", linewidth=1)
        row[0].set(xlabel="probability of being clean", ylabel="labels", title=problem.name)
        scores = {"SENT": outcome.score, "mean loss": -losses.mean(0), "last loss": -losses[-1]}
        for name, score in scores.items():
            false, true, _ = roc_curve(right, score)
            row[1].plot(false, true, label=f"{name} ({roc_auc_score(right, score):.3f})")
        row[1].set(xlabel="wrong labels kept", ylabel="right labels kept", aspect="equal")
        for axes in row:
            axes.legend(fontsize=7, frameon=False)
            axes.spines[["top", "right"]].set_visible(False)
    return figure


@trial.host
def train(run: Run, settings: SentSettings, interventions: Callable[[Task], list[Intervention]]) -> dict[str, float]:
    bench, figures = Bench(run, settings), {}
    run.trainings = len(CORRUPTION)
    for name, make in problems(run, settings):
        if name not in CORRUPTION:
            continue
        problem: Problem = make()
        inputs, labels = problem.training_set(torch.ones_like(problem.right))
        task = Task(problem.num_classes, tuple(inputs.shape[1:]), len(inputs), settings.epochs, run.seed)
        torch.manual_seed(run.seed)
        model = problem.make_model()
        options: dict[str, Any] = {"batch_size": settings.batch_size, "interventions": interventions(task)}
        run.trainer(settings.epochs, name, **options).fit(
            model, TensorDataset(inputs, labels), loss=F.cross_entropy, optimizer=partial(Adam, lr=settings.lr)
        )
        figures[f"{name}_accuracy"] = bench.accuracy(model, problem)
    return figures
