"""The runs of a store: records and live trials that belong together, whoever started them."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

from paperworks.bench import Claim, load_claim
from paperworks.bench.check import Plan, Records
from paperworks.bench.combine import Combination, combined
from paperworks.bench.measure import COMBINE
from paperworks.bench.results import Summary, summarise
from paperworks.bench.store import DamagedRecord, Store, Trial
from paperworks.catalog import SCALES, catalog
from paperworks.errors import UserError

Points = list[tuple[float, float]]
FIELDS = tuple(Trial.__dataclass_fields__)
SAME = tuple(name for name in FIELDS if name not in ("arm", "seed"))


def run_of(trial: Mapping[str, Any]) -> str:
    """The run that a trial, a record or a live trial belongs to: ``claim/scale/digest``."""
    digest = hashlib.sha256(json.dumps([trial[name] for name in SAME], sort_keys=True).encode()).hexdigest()
    return f"{trial['claim']}/{trial['scale']}/{digest[:12]}"


def common_of(trial: Mapping[str, Any]) -> dict[str, Any]:
    """What the trials of a run have in common."""
    return {name: trial[name] for name in SAME}


@dataclass
class StoredRun:
    """Trials that differ only in arm and seed.

    Attributes:
        common: What they have in common.
        planned: Arms that were asked for.
        records: Of the trials that are measured.
        live: Of those that run now.
        changed: When a record last changed, in seconds since 1970.
    """

    common: dict[str, Any]
    planned: Sequence[str] = ()
    records: list[dict[str, Any]] = field(default_factory=list)
    live: list[dict[str, Any]] = field(default_factory=list)
    changed: float = 0.0

    @property
    def id(self) -> str:
        return run_of(self.common)

    @property
    def slug(self) -> str:
        return str(self.common["claim"])

    @property
    def scale(self) -> str:
        return str(self.common["scale"])

    @property
    def settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = self.common["settings"]
        return settings

    @property
    def trials(self) -> list[dict[str, Any]]:
        """Measured and live."""
        return [*self.records, *self.live]

    @cached_property
    def claim(self) -> Claim:
        return load_claim(self.slug)

    @property
    def arms(self) -> list[str]:
        """Its arms, baseline first."""
        there = dict.fromkeys([*self.planned, *(trial["arm"] for trial in self.trials)])
        order = list(self.claim.arms)
        return sorted(there, key=lambda arm: (order.index(arm) if arm in order else arm.count("+") + 99, arm))

    @property
    def is_combination(self) -> bool:
        return any(arm.startswith(COMBINE) for arm in self.arms)

    @property
    def methods(self) -> list[str]:
        """The methods of a combination, in their order; none for a check."""
        subsets = [arm.removeprefix(COMBINE).split("+") for arm in self.arms if arm.startswith(COMBINE)]
        longest: list[str] = max(subsets, key=len, default=[])
        return longest if longest != ["none"] else []

    @property
    def seeds(self) -> int:
        """How many seeds there is a trial of."""
        return 1 + max((trial["seed"] for trial in self.trials), default=-1)

    @property
    def is_current(self) -> bool:
        """Whether the claim's code is still that which measured."""
        source = catalog()[self.slug].claim_source
        changed = source.stat().st_mtime_ns if source else 0
        return bool(self.common["code"].split("+")[0] == _code(self.slug, changed))

    @cached_property
    def overrides(self) -> dict[str, Any]:
        """The settings that are not the scale's own."""
        usual = self.claim.settings.at(self.scale).model_dump(mode="json")
        return {name: value for name, value in self.settings.items() if usual.get(name, ...) != value}

    @cached_property
    def complete(self) -> list[dict[str, Any]]:
        """The records of the scale's arms, of those seeds at which each of them is measured."""
        arms = set(self.claim.arms_at[self.scale])
        by_seed: dict[int, set[str]] = {}
        for record in self.records:
            by_seed.setdefault(record["seed"], set()).add(record["arm"])
        return [record for record in self.records if by_seed[record["seed"]] >= arms and record["arm"] in arms]

    @cached_property
    def summary(self) -> Summary | None:
        """The verdict, if every arm is measured by the claim's present code."""
        if self.is_combination or not self.complete or not self.is_current:
            return None
        return summarise(self.claim, self.scale, self.complete)

    def combination(self, store: str, metric: str | None = None) -> Combination | None:
        """What the factorial found, if all of it is measured."""
        methods = self.methods
        if len(methods) < 2 or not self.records or not self.is_current:
            return None
        plan = Plan(
            self.scale,
            overrides=self.settings,
            device=self.common["device"],
            data_root=self.common["data_root"] or None,
            store=store,
            seeds=self.seeds,
        )
        records = Records(plan, plan.factorial(self.claim, [load_claim(slug) for slug in methods]))
        return None if records.pending else combined(self.claim, methods, records, metric)

    def curves(self, kind: str = "curves") -> dict[str, dict[str, list[Points]]]:
        """Logged curves by name, then arm, one a seed; of ``training``: the trainers that are at work."""
        found: dict[str, dict[str, list[Points]]] = {}
        for trial in self.trials:
            for name, points in trial.get(kind, {}).items():
                found.setdefault(name, {}).setdefault(trial["arm"], []).append(points)
        return {name: found[name] for name in sorted(found)}


class Runs:
    """Reads the runs of a store; a record is read again only when it changed."""

    def __init__(self, url: str) -> None:
        self.store = Store(url)
        self._read: dict[str, tuple[str, dict[str, Any] | None]] = {}

    def all(self) -> list[StoredRun]:
        """Every run, the latest first."""
        return self._of(catalog())

    def of(self, slug: str) -> list[StoredRun]:
        """Those of one claim."""
        return self._of([slug])

    def _of(self, slugs: Collection[str]) -> list[StoredRun]:
        found = {run.id: run for slug in slugs for scale in SCALES for run in self._folder(slug, scale)}
        for live in self._live():
            if live["claim"] not in slugs:
                continue
            run = found.setdefault(run_of(live), StoredRun(common_of(live)))
            run.live.append(live)
            run.changed = time.time()
        known = [run for run in found.values() if _loads(run.slug)]
        return sorted(known, key=lambda run: (-run.changed, run.id))

    def get(self, id: str) -> StoredRun | None:
        """A run by its id, if there is any trial of it."""
        slug, scale, _ = id.split("/")
        run = next((run for run in self._folder(slug, scale) if run.id == id), None)
        live = [live for live in self._live() if run_of(live) == id]
        if run is None and live:
            run = StoredRun(common_of(live[0]))
        if run is not None:
            run.live = live
        return run

    @property
    def damaged(self) -> int:
        """How many records were not usable when last looked at."""
        return sum(record is None for _, record in self._read.values())

    def _folder(self, slug: str, scale: str) -> list[StoredRun]:
        """The runs of a claim at a scale."""
        found: dict[str, StoredRun] = {}
        for path, (changed, mark) in self.store.listing(slug, scale).items():
            if record := self._record(path, mark):
                run = found.setdefault(run_of(record), StoredRun(common_of(record)))
                run.records.append(record)
                run.changed = max(run.changed, changed)
        for run in found.values():
            run.records.sort(key=lambda record: (record["seed"], record["arm"]))
        return list(found.values())

    def _record(self, path: str, mark: str) -> dict[str, Any] | None:
        """A record, or nothing if it is damaged."""
        if self._read.get(path, ("",))[0] != mark:
            try:
                content = json.loads(self.store.read(path))
                trial = Trial(**{name: content[name] for name in FIELDS})
                self._read[path] = mark, self.store.load(trial) if self.store.path(trial) == path else None
            except (OSError, ValueError, KeyError, TypeError, DamagedRecord):
                self._read[path] = mark, None
        return self._read[path][1]

    def _live(self) -> list[dict[str, Any]]:
        found = [live for live in self.store.live() if isinstance(live, dict) and live.keys() >= {*FIELDS, "fraction"}]
        return [live for live in found if self._alive(live)]

    def _alive(self, live: dict[str, Any]) -> bool:
        """Whether the process that wrote it is there; one that was killed leaves its file."""
        if not self.store.local:
            return True
        try:
            os.kill(live["pid"], 0)
        except (KeyError, TypeError, ProcessLookupError):
            return False
        except PermissionError:
            pass
        return True


@cache
def _code(slug: str, changed: int) -> str:
    return load_claim(slug).code


def _loads(slug: str) -> bool:
    """Whether the claim is there; what it needs may have been uninstalled."""
    try:
        load_claim(slug)
    except UserError:
        return False
    return True


def mean_curve(runs: Sequence[Points]) -> list[tuple[float, float, float]]:
    """Step, mean and standard deviation over those seeds that got as far."""
    table: dict[float, list[float]] = {}
    for points in runs:
        for step, value in points:
            table.setdefault(step, []).append(value)
    found = []
    for step, values in sorted(table.items()):
        mean = sum(values) / len(values)
        found.append((step, mean, (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5))
    return found
