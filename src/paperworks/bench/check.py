"""From the names of methods to stored trials: plan, skip what is there, measure the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from paperworks.catalog import SCALES
from paperworks.errors import UserError, unknown

from .claim import Claim
from .executors import EXECUTORS, execute
from .measure import COMBINE
from .store import DamagedRecord, Store, Trial


@dataclass(frozen=True)
class Plan:
    """How claims are measured.

    Attributes:
        scale: ``smoke`` (seconds), ``quick`` (minutes) or ``full`` (half an hour, or a GPU).
        seeds: Seeds 0 … N-1; the claim's own number by default.
        overrides: Settings that differ from the scale's.
        device: ``auto``, ``cpu`` or ``cuda``.
        data_root: Folder of the data sets; the default is that of ``paperworks.data``.
        executor, workers, threads: As in ``execute``.
        store: URL of the records.
        fresh: Measure again what is stored.
    """

    scale: str = "quick"
    seeds: int | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    device: str = "auto"
    data_root: str | Path | None = None
    executor: str = "processes"
    workers: int | None = None
    threads: int = 1
    store: str = "paperworks-runs"
    fresh: bool = False

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise unknown("scale", self.scale, SCALES)
        if self.seeds is not None and self.seeds < 1:
            raise UserError(f"seeds must be at least 1, got {self.seeds}")
        if self.threads < 1:
            raise UserError(f"threads must be at least 1, got {self.threads}")
        if self.executor not in EXECUTORS:
            raise unknown("executor", self.executor, EXECUTORS)
        if self.workers is not None and self.workers < 1:
            raise UserError(f"workers must be at least 1, got {self.workers}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise unknown("device", self.device, ("auto", "cpu", "cuda"))
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("device cuda: no GPU is visible to PyTorch here; use --device cpu or auto")

    def trials(self, claim: Claim, arms: Sequence[str] | None = None, code: str | None = None) -> list[Trial]:
        """Every arm of the scale, or these, at every seed."""
        settings = claim.settings.at(self.scale, self.overrides).model_dump(mode="json")
        device = self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        root = str(Path(self.data_root).expanduser().resolve()) if self.data_root else ""
        code = code or claim.code
        return [
            Trial(claim.slug, arm, seed, self.scale, settings, device, root, code)
            for seed in range(self.seeds or claim.seeds[self.scale])
            for arm in arms or claim.arms_at[self.scale]
        ]

    def factorial(self, claim: Claim, joining: Sequence[Claim]) -> list[Trial]:
        """The claim's training under every subset of the methods, the empty one first."""
        slugs = [method.slug for method in joining]
        subsets = [subset for size in range(len(slugs) + 1) for subset in combinations(slugs, size)]
        arms = [COMBINE + ("+".join(subset) or "none") for subset in subsets]
        code = "+".join([claim.code, *(method.code for method in joining)])
        return self.trials(claim, arms, code)


class Records:
    """The records of some trials: those that are stored, and those still to measure.

    Attributes:
        pending: Trials without a usable record.
        done: How many of those are measured by now.
        damaged: Which records were there but not usable, by reason; they are measured again.
    """

    def __init__(self, plan: Plan, trials: Sequence[Trial]) -> None:
        self.plan, self.trials = plan, list(trials)
        self.store = Store(plan.store)
        self.damaged: dict[str, list[str]] = {}
        self.done = 0
        self._found: dict[str, dict[str, Any]] = {}
        self.pending = [trial for trial in self.trials if plan.fresh or not self._load(trial)]

    def measure(self) -> Iterator[Trial]:
        """Measure what is pending; yields each trial as its record is stored."""
        if not self.pending:
            return
        self.store.check_writable()
        plan = self.plan
        options: dict[str, Any] = {"workers": plan.workers, "threads": plan.threads, "fresh": plan.fresh}
        for trial in execute(self.pending, self.store.address, plan.executor, **options):
            if not self._load(trial):
                raise UserError(f"the record of {trial.key} vanished from the store {plan.store}")
            self.done += 1
            yield trial

    def of(self, claim: Claim) -> list[dict[str, Any]]:
        """The records of one claim's trials."""
        return [self._found[trial.key] for trial in self.trials if trial.claim == claim.slug]

    def artefact(self, record: dict[str, Any], name: str) -> bytes:
        """The content of a record's figure or file."""
        trial = next(t for t in self.trials if self._found[t.key] is record)
        return self.store.read(self.store.artefact(trial, name))

    def _load(self, trial: Trial) -> bool:
        try:
            record = self.store.load(trial)
        except DamagedRecord as error:
            self.damaged.setdefault(str(error), []).append(self.store.path(trial))
            return False
        if record is not None:
            self._found[trial.key] = record
        return record is not None
