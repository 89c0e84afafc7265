"""What an audit found: verdicts, the questions that carry each cue, splits and weights, as text, JSON or a page."""

import csv
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from matplotlib.figure import Figure

from paperworks.audit.mrclens.candidates import Unit, key
from paperworks.audit.mrclens.data import MRCDataset
from paperworks.audit.mrclens.example import Example
from paperworks.audit.mrclens.page import PAGE, png
from paperworks.audit.mrclens.profile import Profile
from paperworks.audit.mrclens.statistics import balanceable, balancing_weights
from paperworks.errors import UserError, unknown

SIGNIFICANCE, MIN_ADVANTAGE = 0.01, 0.05


@dataclass
class Finding:
    """What was found of one cue. What needs a probe is ``None`` where there were too few questions for one.

    Attributes:
        cue: Its name.
        side: Passage, question, question-passage or answer.
        unit: What it ranks.
        about: What it points to.
        questions: How many it ranked.
        chance: Share that a guess gets right.
        statistic: Share in which its score alone points to the answer, ties shared.
        accuracy: The same for the probe.
        advantage: (accuracy - chance) / (1 - chance).
        low, high: 95 % interval of the advantage, over passages.
        p: Of the permutation test.
        p_holm: Corrected for the number of cues.
        conditional: What the cue adds to the advantage of all other cues together.
        divergence: For places: KL divergence in nats of the answers' places from uniform ones.
        biased: The verdict.
        severity: ``low``, ``medium`` or ``high`` if biased, else empty.
    """

    cue: str
    side: str
    unit: str
    about: str
    questions: int
    chance: float
    statistic: float
    accuracy: float | None = None
    advantage: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    conditional: float | None = None
    divergence: float | None = None
    biased: bool | None = None
    severity: str = ""

    @property
    def verdict(self) -> str:
        """The verdict in a word or two."""
        if self.biased is None:
            return "no verdict"
        if self.biased:
            return f"solvable: {self.severity}"
        return "small" if self.p_holm is not None and self.p_holm < SIGNIFICANCE else "no evidence"


class Combined(NamedTuple):
    """How well a probe on all cues of a unit does."""

    accuracy: float
    advantage: float
    low: float
    high: float


@dataclass(frozen=True)
class Ranked:
    """One ranking's success: index of each question in the set, what it counts, and what a guess counts."""

    rows: Int[np.ndarray, " questions"]
    hits: Float[np.ndarray, " questions"]
    chance: Float[np.ndarray, " questions"]

    @property
    def tag(self) -> Bool[np.ndarray, " questions"]:
        """Whether the right candidate alone is ranked first."""
        return self.hits == 1


class Split(NamedTuple):
    """Ids in the order of the set: questions that a biased cue alone solves, and all others."""

    biased: list[str]
    anti: list[str]


class Gap(NamedTuple):
    """What a model would gain that follows a cue, and lose where no biased cue helps.

    Attributes:
        accuracy: On all questions it ranks.
        gain: The same above chance.
        biased: On questions that some biased cue of the same kind solves.
        anti: On the others; ``None`` if there are none.
        drop: Biased less anti.
    """

    accuracy: float
    gain: float
    biased: float
    anti: float | None
    drop: float | None


@dataclass
class AuditReport:
    """The result of ``audit``.

    Attributes:
        data: The set.
        findings: One a cue, in the order of the taxonomy.
        combined: All cues of a unit together.
        ranked: Each cue's ranking, and ``"all"``: that by all cues of the first unit together.
        profile: What the set looks like.
        notes: What was left out or repaired, and why verdicts are missing.
        n, seed: As they were given.
    """

    data: MRCDataset
    findings: list[Finding]
    combined: dict[Unit, Combined]
    ranked: dict[str, Ranked]
    profile: Profile
    notes: list[str]
    n: int
    seed: int

    def __getitem__(self, cue: str) -> Finding:
        """The finding on a cue.

        Raises:
            UserError: For one that was not audited.
        """
        found = {finding.cue: finding for finding in self.findings}
        if cue not in found:
            raise unknown("cue of this report", cue, found)
        return found[cue]

    @property
    def biased(self) -> list[str]:
        """The cues whose verdict is biased."""
        return [finding.cue for finding in self.findings if finding.biased]

    def tags(self) -> dict[str, list[str]]:
        """For each question the cues that alone rank its answer first: ``{id: [cue, …]}``, in the set's order."""
        tags: dict[str, list[str]] = {example.id: [] for example in self.data}
        for finding in self.findings:
            ranking = self.ranked[finding.cue]
            for row in ranking.rows[ranking.tag]:
                tags[self.data[int(row)].id].append(finding.cue)
        return tags

    def split(self, cue: str | None = None) -> Split:
        """The questions that a cue alone solves, and all others; by default those that any biased cue solves.

        Raises:
            UserError: For a cue that was not audited.
        """
        tagged = np.zeros(len(self.data), bool)
        for name in self.biased if cue is None else [cue]:
            ranking = self._ranking(name)
            tagged[ranking.rows[ranking.tag]] = True
        ids = [example.id for example in self.data]
        return Split(
            [id for id, tag in zip(ids, tagged, strict=True) if tag],
            [id for id, tag in zip(ids, tagged, strict=True) if not tag],
        )

    def balance(self, cue: str | None = None, limit: float = 10.0) -> dict[str, float]:
        """Weights by id under which following a cue does as well as guessing; see ``balancing_weights``.

        Questions that the cue does not rank weigh 1.

        Args:
            cue: Its name, or ``"all"``: the probe on all cues together, which is the default.
            limit: Largest weight; the mean is 1.

        Raises:
            UserError: For a cue that was not audited, or one that no question goes against.
        """
        if not limit > 1:
            raise UserError(f"limit must be above 1, got {limit}")
        name = self._default if cue is None else cue
        ranking = self._ranking(name)
        if not balanceable(ranking.hits, ranking.chance):
            raise UserError(f"{name} is never worse, or never better, than a guess: no weights can balance it")
        weights = np.ones(len(self.data))
        weights[ranking.rows] = balancing_weights(ranking.hits, ranking.chance, limit)
        return {example.id: float(weight) for example, weight in zip(self.data, weights, strict=True)}

    def subsample(self, cue: str | None = None, limit: float = 10.0) -> list[str]:
        """Ids of a part of the set that is balanced as ``balance`` says: kept with odds that go with the weights.

        Raises:
            UserError: As ``balance`` does.
        """
        weights = self.balance(cue, limit)
        largest = max(weights.values())
        draw = {id: int.from_bytes(key(self.seed, f"subsample {id}"), "big") / 2**64 for id in weights}
        return [id for id, weight in weights.items() if draw[id] < weight / largest]

    def summary(self) -> dict[str, Any]:
        """Everything but the single questions, ready for JSON."""
        return {
            "name": self.data.name,
            "questions": len(self.data),
            "n": self.n,
            "seed": self.seed,
            "biased": self.biased,
            "findings": [asdict(finding) | {"verdict": finding.verdict} for finding in self.findings],
            "combined": {unit: found._asdict() for unit, found in self.combined.items()},
            "gaps": {name: gap._asdict() for name, gap in predict_gap(self).items()},
            "profile": self.profile._asdict(),
            "notes": self.notes,
        }

    def rows(self) -> list[dict[str, Any]]:
        """One row a question: id, question, answer and the cues that solve it."""
        tags, biased = self.tags(), set(self.biased)
        return [
            {
                "id": example.id,
                "question": example.question,
                "answer": _answer(example),
                "cues": tags[example.id],
                "biased": not biased.isdisjoint(tags[example.id]),
            }
            for example in self.data
        ]

    def to_json(self) -> str:
        """The summary, and under ``examples`` the rows."""
        return json.dumps(self.summary() | {"examples": self.rows()}, indent=1, ensure_ascii=False, allow_nan=False)

    def to_markdown(self) -> str:
        """The findings as Markdown."""
        lines = [f"# {self.data.name.replace('|', ' ')}", "", *(f"{text}  " for text in self.sentences()), ""]
        lines += ["| " + " | ".join(HEADER) + " |", "|" + " --- |" * len(HEADER)]
        lines += ["| " + " | ".join(cells(finding)) + " |" for finding in self.findings]
        gaps = predict_gap(self)
        if gaps:
            lines += ["", "| a model that follows | gets right | above chance | where a cue helps | elsewhere |"]
            lines += ["|" + " --- |" * 5]
            lines += [
                f"| {name} | {gap.accuracy:.3f} | {gap.gain:+.3f} | {gap.biased:.3f} | {_figure(gap.anti)} |"
                for name, gap in gaps.items()
            ]
        return "\n".join(lines) + "\n"

    def sentences(self) -> list[str]:
        """What the figures say, and the notes."""
        shape = self.profile
        split = self.split()
        verdict = (
            f"Solvable by cues: {', '.join(self.biased)}. "
            f"Of {len(self.data)} questions, one of them alone solves {len(split.biased)}."
            if self.biased
            else "No cue has a verdict of bias."
        )
        together = [
            f"All cues of the {unit} together get {found.accuracy:.3f} right: advantage {found.advantage:.3f} "
            f"({found.low:.3f} … {found.high:.3f})."
            for unit, found in self.combined.items()
        ]
        return [
            f"{shape.questions} usable questions on {shape.passages} passages, "
            f"{shape.candidates:.2f} candidates a question.",
            verdict,
            *together,
            *self.notes,
            "Solvable by a cue means neither flawed nor that a model will follow it: it may find better evidence.",
        ]

    def figures(self) -> dict[str, Figure]:
        """``cues``: each cue's advantage with its interval; ``places``: where the right candidates stand."""
        cues, places = Figure(figsize=(6.5, 0.6 + 0.32 * len(self.findings))), Figure(figsize=(4.5, 2.4))
        axis = cues.subplots()
        for row, finding in enumerate(reversed(self.findings)):
            guess = (finding.statistic - finding.chance) / (1 - finding.chance)
            axis.plot(guess, row, "|", color="0.5", markersize=11)
            if finding.advantage is not None and finding.low is not None and finding.high is not None:
                colour = "tab:red" if finding.biased else "tab:blue"
                axis.barh(row, finding.advantage, height=0.6, color=colour, alpha=0.75)
                axis.plot([finding.low, finding.high], [row, row], color="black", linewidth=1.5)
        axis.set_yticks(range(len(self.findings)), [finding.cue for finding in reversed(self.findings)])
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_xlabel("advantage over chance: probe (bar, 95 % interval), cue alone (|)")
        axis = places.subplots()
        axis.bar(range(1, len(self.profile.places) + 1), self.profile.places, color="tab:blue", alpha=0.75)
        axis.set_xlabel("place of the right candidate")
        axis.set_ylabel("share")
        for figure in (cues, places):
            figure.tight_layout()
        return {"cues": cues, "places": places}

    def to_html(self, examples: int = 200) -> str:
        """A page that stands alone, with the first ``examples`` questions that a biased cue solves."""
        rows = [row for row in self.rows() if row["biased"]]
        return PAGE.render(
            name=self.data.name,
            sentences=self.sentences(),
            header=HEADER,
            table=[(finding, cells(finding)) for finding in self.findings],
            gaps=predict_gap(self),
            figures={name: png(figure) for name, figure in self.figures().items()},
            rows=rows[:examples],
            total=len(rows),
        )

    def export(self, folder: str | Path) -> list[Path]:
        """Write ``biased.json``, ``anti-biased.json`` and ``balanced.json`` in the set's format, and ``tags.csv``.

        ``tags.csv`` has a line a question: its id, its weight, whether a biased cue solves it, and a column of 0 and 1
        for each cue. An empty split is not written, nor are a balanced one and weights where there can be none.

        Raises:
            UserError: If the folder cannot be written to, or holds such files already.
        """
        folder = Path(folder)
        split, files, ranking = self.split(), [], self._ranking(self._default)
        possible = balanceable(ranking.hits, ranking.chance)
        balanced = self.subsample() if possible else []
        parts = {"biased": split.biased, "anti-biased": split.anti, "balanced": balanced}
        targets = [folder / f"{name}.json" for name in parts] + [folder / "tags.csv"]
        taken = [file.name for file in targets if file.exists()]
        if taken:
            raise UserError(f"{folder} holds {', '.join(taken)} already: choose another folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for file, ids in zip(targets, parts.values(), strict=False):
                if ids:
                    self.data.subset(ids).save(file)
                    files.append(file)
            targets[-1].write_text(self._csv(self.balance() if possible else {}), "utf-8")
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error}") from error
        return [*files, targets[-1]]

    def _csv(self, weights: dict[str, float]) -> str:
        out, names = io.StringIO(), [finding.cue for finding in self.findings]
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["id", *(["weight"] if weights else []), "biased", *names])
        for row in self.rows():
            weight = [f"{weights[row['id']]:.4f}"] if weights else []
            writer.writerow([row["id"], *weight, int(row["biased"]), *(int(name in row["cues"]) for name in names)])
        return out.getvalue()

    @property
    def _default(self) -> str:
        """All cues together, or the only one."""
        return "all" if "all" in self.ranked else self.findings[0].cue

    def _ranking(self, cue: str) -> Ranked:
        if cue not in self.ranked:
            raise unknown("cue of this report", cue, self.ranked)
        return self.ranked[cue]


def predict_gap(report: AuditReport) -> dict[str, Gap]:
    """How a model that follows each biased cue would do, everywhere and where no biased cue helps.

    The models are the probes; ``"all"`` follows all cues. Compare the same two subsets (``report.split()``) with a
    reader of your own to see whether it is such a model.
    """
    units = {finding.cue: finding.unit for finding in report.findings}
    gaps = {}
    first = report.findings[0].unit
    for name in [*report.biased, *(["all"] if report.biased and "all" in report.ranked else [])]:
        ranking, unit = report.ranked[name], units.get(name, first)
        helped = np.zeros(len(ranking.rows), bool)
        for cue in report.biased:
            if units[cue] == unit:
                helped |= report.ranked[cue].tag
        if not helped.any():
            continue
        accuracy, biased = float(ranking.hits.mean()), float(ranking.hits[helped].mean())
        anti = float(ranking.hits[~helped].mean()) if not helped.all() else None
        gain = accuracy - float(ranking.chance.mean())
        gaps[name] = Gap(accuracy, gain, biased, anti, None if anti is None else biased - anti)
    return gaps


HEADER = ("cue", "side", "chance", "cue alone", "probe", "advantage", "95 % interval", "p (Holm)", "adds", "verdict")


def cells(finding: Finding) -> list[str]:
    """A finding as the cells of a table under ``HEADER``."""
    interval = "–" if finding.low is None else f"{finding.low:.3f} … {finding.high:.3f}"
    return [
        finding.cue,
        finding.side,
        *map(_figure, (finding.chance, finding.statistic, finding.accuracy, finding.advantage)),
        interval,
        _figure(finding.p_holm),
        _figure(finding.conditional),
        finding.verdict,
    ]


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _answer(example: Example) -> str:
    if example.label is not None and example.options:
        return example.options[example.label]
    return example.answers[0].text if example.answers else ""
