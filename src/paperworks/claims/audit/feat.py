"""Where an LSTM reads DNA, two changes that FEAT chooses flip at least 8 points more of its predictions than greedy
search among five features by gradient, and at most 5 points fewer than greedy search among all, at under 1/2.5 of the
latter's queries.

Data are UCI's splice junctions (60 bases, ambiguous ones left out), or generated ones where they are not on this
machine; the artefact ``data`` says which. Each seed draws the split and the victims' start anew; the last fifth is for
test, of which all arms attack the same rows, rightly classified, with at most 300 queries a row: rows scored, and one a
gradient. ``queries`` is the mean over all rows attacked, failures included; ``success_queries`` that over an arm's own
successes; ``regret`` what pulling the best feature only would have won more. Nothing is tuned, neither for FEAT nor for
its neighbours: the defaults are those of runs on other draws.

Within 300 queries greedy search among all features (``fsgs``) scores all of its first changes and two thirds of its
second ones; ``fsgs-unbounded`` scores all. ``feat-scores`` is given scores only, and measures the effects of features
on 32 random rows; ``ucb`` and ``random`` use scores only as well.

Two further victims: ``conv`` is a smooth network on the same data. ``boosting`` is scikit-learn's gradient boosting,
attacked by those that use scores only, on UCI Adult (else on the same sequences): age, sex, race, country and sampling
weight stay as they are. ``full`` adds digits as 64 features of 17 values, AG News' first 20 words with the 15 nearest
words as substitutes, other numbers of changes, and an adversarially trained LSTM.

What is known not to hold: it takes a victim whose gradient misleads. That of this LSTM, built as victims in this line
of work are, tells which features matter but not which values, as those lie at the kinks of ReLUs. On the smooth network
plain gradient steps reach what greedy search does, in four queries, and FEAT needs more for no more. The bandit's bonus
and refitting matter little. Given scores only, FEAT is hardly better than the bandit alone, and on boosting no better.
The LSTM is bidirectional, since one that reads forward only does not learn the junctions in 30 epochs. DNA so changed
means nothing to a biologist.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from pydantic import Field
from sklearn.ensemble import HistGradientBoostingClassifier
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam
from torch.utils.data import TensorDataset

from paperworks.audit import (
    AttackResult,
    CategoricalProblem,
    CategoricalTable,
    attack_batch,
    changes_table,
    load_adult,
    load_splice,
    read_categorical,
)
from paperworks.audit.feat import SequenceConv, SequenceLSTM
from paperworks.bench import Close, Gain, Ratio, Run, Settings, claim, scaled
from paperworks.data import DatasetNotFound, load, split
from paperworks.data.text import has_ag_news, load_text
from paperworks.errors import UserError

UNBOUNDED = 10**6


@dataclass(frozen=True)
class Arm:
    """A method, its options, and whether it needs gradients."""

    method: str
    options: tuple[tuple[str, Any], ...] = ()
    gradients: bool = True
    bounded: bool = True


ARMS = {
    "random": Arm("random", gradients=False),
    "gradient": Arm("gradient"),
    "ompgs-5": Arm("ompgs", (("top", 5),)),
    "ompgs-20": Arm("ompgs", (("top", 20),)),
    "fsgs": Arm("fsgs", gradients=False),
    "fsgs-unbounded": Arm("fsgs", gradients=False, bounded=False),
    "ucb": Arm("ucb", gradients=False),
    "feat": Arm("feat"),
    "feat-no-bonus": Arm("feat", (("alpha", 0.0),)),
    "feat-refit": Arm("feat", (("refit", True),)),
    "feat-scores": Arm("feat", (("samples", 32),), gradients=False),
}
UNCHANGED = ("age", "fnlwgt", "race", "sex", "native-country")


class FeatSettings(Settings):
    """What the arms share."""

    data: str = scaled(
        smoke="synthetic",
        quick="auto",
        full="auto",
        description="splice, synthetic, or a CSV of categorical columns; auto: splice if it is there, else synthetic",
    )
    table: str = scaled(
        smoke="synthetic",
        quick="auto",
        full="auto",
        description="what boosting is attacked on: adult or data; auto: adult if it is there, else data",
    )
    target: str | None = Field(None, description="the column of labels in a CSV")
    size: int = scaled(smoke=500, quick=8000, full=40_000, ge=50, description="rows of a table, at most")
    attacked: int = scaled(smoke=8, quick=60, full=200, ge=1, description="rows attacked, at most")
    max_changes: int = Field(2, ge=1, description="features that may change")
    max_queries: int = Field(300, ge=2, description="queries a row")
    hidden: int = scaled(smoke=16, quick=32, full=32, ge=1, description="width of the victims")
    epochs: int = scaled(smoke=4, quick=30, full=30, ge=1, description="passes over the training data")
    batch_size: int = scaled(smoke=32, quick=128, full=128, ge=2, description="examples a step")
    lr: float = Field(5e-3, gt=0, description="Adam's learning rate")
    more_changes: tuple[int, ...] = scaled(smoke=(), quick=(), full=(1, 3, 5), description="other budgets of changes")
    more_victims: bool = scaled(
        smoke=False, quick=False, full=True, description="also digits, texts and an adversarially trained LSTM"
    )


@dataclass(frozen=True)
class Victim:
    """A classifier, its accuracy, and the rows of its test set to attack."""

    name: str
    source: str
    problem: Callable[[], CategoricalProblem]
    accuracy: float
    rows: Tensor
    labels: Tensor
    gradients: bool = True
    allowed: Tensor | None = None
    table: CategoricalTable | None = None


# The data.


def junctions(size: int, generator: torch.Generator) -> CategoricalTable:
    """Random bases; at the middle of two classes in three is a noisy junction, AG before it or GT after it."""
    rows = torch.randint(4, (size, 60), generator=generator)
    targets = torch.randint(3, (size,), generator=generator)
    for k, place, motif in [(0, 24, (3, 3, 2, 3, 0, 1, 1)), (2, 27, (3, 0, 1, 1, 2, 0, 0, 1, 2))]:
        for offset, base in enumerate(motif):
            keep = (targets == k) & (torch.rand(size, generator=generator) < 0.85)
            rows[keep, place + offset] = base
    names = tuple(f"{i:+d}" for i in (*range(-30, 0), *range(1, 31)))
    return CategoricalTable(rows, targets, names, (("A", "G", "T", "C"),) * 60, ("IE", "N", "EI"))


def sequences(run: Run, settings: FeatSettings) -> tuple[str, CategoricalTable]:
    """What the networks learn."""
    if settings.data in ("splice", "auto"):
        try:
            return "splice", load_splice(root=run.data_root)
        except DatasetNotFound:
            if settings.data == "splice":
                raise
    if settings.data in ("synthetic", "auto"):
        return "synthetic", junctions(min(settings.size, 3000), run.generator("junctions"))
    table = read_categorical(settings.data, target=settings.target, root=run.data_root)
    return settings.data, limited(table, settings.size, run)


def limited(table: CategoricalTable, size: int, run: Run) -> CategoricalTable:
    """As many rows, drawn at random."""
    rows = torch.randperm(len(table.rows), generator=run.generator("rows"))[:size]
    return replace(table, rows=table.rows[rows], targets=table.targets[rows])


# The victims.


def fit(
    run: Run, settings: FeatSettings, name: str, model: nn.Module, inputs: Tensor, labels: Tensor, lr: float
) -> None:
    trainer = run.trainer(settings.epochs, name, batch_size=settings.batch_size)
    trainer.fit(model, TensorDataset(inputs, labels), loss=F.cross_entropy, optimizer=partial(Adam, lr=lr))
    model.eval()


@torch.no_grad()
def predict(model: nn.Module, inputs: Tensor) -> Tensor:
    device = next(model.parameters()).device
    return torch.cat([model(part.to(device)).argmax(1).cpu() for part in torch.split(inputs, 512)])


def attackable(
    settings: FeatSettings, predicted: Tensor, labels: Tensor, usable: Tensor, rows: Tensor
) -> tuple[float, Tensor]:
    """Accuracy, and which test rows are attacked: the first that are right and hold allowed values only."""
    right = predicted == labels[rows]
    chosen = rows[right & usable[rows]][: settings.attacked]
    if not len(chosen):
        raise UserError("the victim is right about no test row: train it for longer (epochs=)")
    return float(right.double().mean()), chosen


def network(
    run: Run,
    settings: FeatSettings,
    name: str,
    source: str,
    table: CategoricalTable,
    make: Callable[[int, int, int], nn.Module],
    lr: float,
    adversarial: bool = False,
) -> Victim:
    """A victim that reads one-hot rows of a table."""
    n, m = len(table.features), max(table.n_values)
    train, test = split(table.targets, (0.8, 0.2), run.seed)
    torch.manual_seed(run.seed)
    model = make(n, m, len(table.classes))
    labels = table.targets
    fit(run, settings, name, model, F.one_hot(table.rows[train], m).float(), labels[train], lr)
    allowed = table.allowed()
    problem = partial(CategoricalProblem, model, m, allowed)
    if adversarial:  # learn on from the rows that plain gradient steps make of the training set
        usable = train[table.within(allowed)[train]]
        found = attack_batch("gradient", problem(), table.rows[usable], labels[usable], settings.max_changes)
        rows = torch.cat([table.rows[train], torch.stack([result.x_adv for result in found])])
        again = torch.cat([labels[train], labels[usable]])
        fit(run, settings, f"{name}-again", model, F.one_hot(rows, m).float(), again, lr)
    predicted = predict(model, F.one_hot(table.rows[test], m).float())
    accuracy, chosen = attackable(settings, predicted, labels, table.within(allowed), test)
    return Victim(name, source, problem, accuracy, table.rows[chosen], labels[chosen], table=table)


def boosting(run: Run, settings: FeatSettings, source: str, table: CategoricalTable) -> Victim:
    """Gradient boosting, of which only scores are to be had."""
    mutable = None
    if settings.table in ("adult", "auto"):
        try:
            source, table = "adult", limited(load_adult(root=run.data_root), settings.size, run)
            mutable = table.all_but(*UNCHANGED)
        except DatasetNotFound:
            if settings.table == "adult":
                raise
    train, test = split(table.targets, (0.8, 0.2), run.seed)
    columns = list(range(len(table.features)))
    model = HistGradientBoostingClassifier(categorical_features=columns, random_state=run.seed)
    model.fit(table.rows[train].numpy(), table.targets[train].numpy())
    predicted = torch.from_numpy(model.predict(table.rows[test].numpy()))
    allowed = table.allowed()
    accuracy, chosen = attackable(settings, predicted, table.targets, table.within(allowed), test)
    problem = partial(CategoricalProblem.from_scores, model.predict_proba, table.n_values, allowed, mutable=mutable)
    rows, labels = table.rows[chosen], table.targets[chosen]
    return Victim("boosting", source, problem, accuracy, rows, labels, gradients=False, table=table)


def digits(run: Run, settings: FeatSettings) -> Victim:
    """Pixels as features of 17 grey levels."""
    data = load("digits")
    levels = tuple(str(level) for level in range(17))
    names = tuple(f"{i},{j}" for i in range(8) for j in range(8))
    rows = (data.inputs.flatten(1) * 16).round().long()
    table = CategoricalTable(rows, data.targets, names, (levels,) * 64, data.classes)
    return network(run, settings, "digits", "digits", table, partial(SequenceConv, width=settings.hidden), 1e-3)


class TextConv(nn.Module):
    """A convolution over word embeddings, and the largest answer of each channel."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(width, 64, 3, padding=1), nn.Linear(64, num_classes)

    def forward(self, embedded: Tensor) -> Tensor:
        return self.head(self.conv(embedded.transpose(1, 2)).relu().amax(2))


def news(run: Run, settings: FeatSettings, words: int = 2000, length: int = 20, substitutes: int = 15) -> Victim:
    """AG News' first words; each may become one of its nearest in the victim's own embedding."""
    from sklearn.feature_extraction.text import CountVectorizer

    data = load_text("ag_news", root=run.data_root)
    train, test = split(data.targets, (0.8, 0.2), run.seed)
    counted = CountVectorizer(max_features=words - 2).fit([data.texts[i] for i in train.tolist()])
    tokens, number = counted.build_analyzer(), counted.vocabulary_
    rows = torch.zeros(len(data.texts), length, dtype=torch.long)  # 0: nothing, 1: another word
    for i, text in enumerate(data.texts):
        codes = [number.get(token, -1) + 2 for token in tokens(text)[:length]]
        rows[i, : len(codes)] = torch.tensor(codes)
    torch.manual_seed(run.seed)
    table, top = nn.Embedding(words, 32), TextConv(32, len(data.classes))
    model = nn.Sequential(table, top)
    fit(run, replace_epochs(settings, 8), "text", model, rows[train], data.targets[train], 2e-3)
    accuracy, chosen = attackable(
        settings, predict(model, rows[test]), data.targets, torch.ones(len(rows), dtype=torch.bool), test
    )
    embedding = table.weight.detach()
    near = torch.cdist(embedding, embedding)[:, 2:].topk(substitutes + 1, largest=False).indices + 2
    known = torch.eye(words, dtype=torch.bool)
    known[2:] = known[2:].scatter(1, near[2:].cpu(), True)
    problem = partial(CategoricalProblem, top, words, embedding=embedding)
    attacked = rows[chosen]
    return Victim("text", "ag_news", problem, accuracy, attacked, data.targets[chosen], allowed=known[attacked])


def replace_epochs(settings: FeatSettings, epochs: int) -> FeatSettings:
    """Texts are learnt by heart sooner than sequences are learnt."""
    return settings.model_copy(update={"epochs": epochs})


KEPT: dict[object, list[Victim]] = {}  # all arms of a seed attack the same victims: a process keeps them


def victims(run: Run, settings: FeatSettings) -> list[Victim]:
    key = (run.seed, run.device, str(run.data_root), settings)
    if key not in KEPT:
        source, table = sequences(run, settings)
        run.trainings = 6 if settings.more_victims else 2

        def lstm(n: int, m: int, classes: int) -> nn.Module:
            return SequenceLSTM(m, classes, settings.hidden)

        found = [
            network(run, settings, "lstm", source, table, lstm, settings.lr),
            network(run, settings, "conv", source, table, partial(SequenceConv, width=settings.hidden), 1e-3),
            boosting(run, settings, source, table),
        ]
        if settings.more_victims:
            found += [network(run, settings, "robust", source, table, lstm, settings.lr, adversarial=True)]
            found += [digits(run, settings)]
            found += [news(run, settings)] if has_ag_news(run.data_root) else []
        KEPT[key] = found
    return KEPT[key]


# The attacks.


def attack(run: Run, settings: FeatSettings, arm: Arm, victim: Victim, max_changes: int) -> list[AttackResult]:
    return attack_batch(
        arm.method,
        victim.problem(),
        victim.rows,
        victim.labels,
        max_changes,
        settings.max_queries if arm.bounded else UNBOUNDED,
        allowed=victim.allowed,
        generator=run.generator("attack", victim.name),
        **dict(arm.options),
    )


def summary(results: list[AttackResult], name: str) -> dict[str, float]:
    """Share of successes, mean queries over all rows and over the successes, and mean regret of those who pull arms."""
    prefix = "" if name == "lstm" else f"{name}_"
    queries = np.array([result.queries for result in results], dtype=float)
    won = np.array([result.success for result in results])
    figures = {f"{prefix}success": float(won.mean()), f"{prefix}queries": float(queries.mean())}
    if won.any():
        figures[f"{prefix}success_queries"] = float(queries[won].mean())
    if books := [result for result in results if result.rounds]:
        figures[f"{prefix}regret"] = float(np.mean([result.regret[-1] for result in books]))
    return figures


def figure(table: CategoricalTable, results: list[AttackResult], title: str) -> Figure:
    """How often each feature was changed."""
    times = np.zeros(len(table.features))
    for result in results:
        times[[change.feature for change in result.changed if result.success]] += 1
    drawing, axis = plt.subplots(figsize=(8, 2.6))
    axis.bar(range(len(times)), times)
    step = max(1, len(times) // 20)
    axis.set_xticks(range(0, len(times), step), table.features[::step], rotation=45, ha="right", fontsize=8)
    axis.set_title(title, fontsize=10)
    axis.set_ylabel("successes")
    drawing.tight_layout()
    plt.close(drawing)
    return drawing


@claim(
    "feat",
    arms=list(ARMS),
    expects=[
        Gain("success", "feat", over="ompgs-5", at_least=0.08),
        Close("success", "feat", to="fsgs", within=0.05),
        Ratio("queries", "fsgs", over="feat", at_least=2.5),
    ],
)
def trial(run: Run, arm: str, settings: FeatSettings) -> dict[str, float]:
    chosen = ARMS[arm]
    figures: dict[str, float] = {}
    attacked = [victim for victim in victims(run, settings) if victim.gradients or not chosen.gradients]
    for victim in attacked:
        max_changes = min(settings.max_changes, victim.rows.shape[1])
        results = attack(run, settings, chosen, victim, max_changes)
        figures |= summary(results, victim.name)
        if victim.name == "lstm":
            figures["accuracy"] = victim.accuracy
            for queries in range(0, settings.max_queries + 1, 10):
                share = np.mean([result.success and result.queries <= queries for result in results])
                run.log(queries, success=float(share))
            for changes in settings.more_changes:
                other = attack(run, settings, chosen, victim, changes)
                figures[f"success_{changes}"] = float(np.mean([result.success for result in other]))
        if run.seed == 0 and victim.table and (victim.name, arm) in (("lstm", "feat"), ("boosting", "feat-scores")):
            table = victim.table
            run.figure(f"changes of {victim.name}", figure(table, results, f"{victim.source}: what {arm} changed"))
            run.save(f"changes of {victim.name}", changes_table(results, table.features, table.values).to_csv())
    run.save("data", {victim.name: f"{victim.source}, accuracy {victim.accuracy:.3f}" for victim in attacked})
    return figures
