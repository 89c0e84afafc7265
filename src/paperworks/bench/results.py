"""What a check found, in numbers: verdicts, arms, settings, machine. Kept as JSON in ``results/``."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import BaseModel, ValidationError, field_serializer, field_validator

from paperworks.catalog import SCALES
from paperworks.errors import UserError

from .claim import Claim
from .expectations import Judgement, Table, Verdict, overall


class Found(BaseModel):
    """One expectation as measured. An unbounded end of the interval is null in JSON."""

    name: str
    verdict: Judgement
    estimate: float
    low: float
    high: float
    bar: float
    direction: str
    unit: str

    @field_serializer("low", "high")
    def _bounded(self, value: float) -> float | None:
        return value if math.isfinite(value) else None

    @field_validator("low", mode="before")
    @classmethod
    def _low(cls, value: float | None) -> float:
        return -math.inf if value is None else value

    @field_validator("high", mode="before")
    @classmethod
    def _high(cls, value: float | None) -> float:
        return math.inf if value is None else value


class Unjudged(BaseModel):
    """Expectations that were not judged for want of arms.

    Attributes:
        names: Their labels.
        missing: Arms that were not measured.
        scales: Where they are.
    """

    names: list[str]
    missing: list[str]
    scales: list[str]

    def __str__(self) -> str:
        return f"{', '.join(self.names)} (needs {', '.join(self.missing)}; judged at {', '.join(self.scales)})"


class Summary(BaseModel):
    """All that a report says about one claim at one scale.

    Attributes:
        verdict: Over the expectations that were judged; none if there were none.
        unjudged: Those that were not.
        chosen: The arms, where others were asked for than the scale's own.
        changed: Settings that are not the scale's own.
    """

    slug: str
    scale: str
    seeds: int
    verdict: Judgement | None
    expectations: list[Found]
    unjudged: list[Unjudged] = []
    chosen: list[str] = []
    changed: dict[str, Any] = {}
    arms: dict[str, dict[str, list[float]]]
    settings: dict[str, Any]
    device: str
    versions: dict[str, Any]
    machine: dict[str, Any]
    cpu_seconds: float
    measured: str
    digest: str

    def brief(self) -> dict[str, Any]:
        """What ``report --json`` prints of it."""
        fields = {"name", "verdict", "estimate", "low", "high"}
        expectations = [found.model_dump(mode="json", include=fields) for found in self.expectations]
        brief = {"slug": self.slug, "scale": self.scale, "seeds": self.seeds, "expectations": expectations}
        brief |= {"arms": self.chosen} if self.chosen else {}
        brief |= {"changed": self.changed} if self.changed else {}
        return brief | ({"unjudged": [left.model_dump() for left in self.unjudged]} if self.unjudged else {})

    @property
    def verdict_text(self) -> str:
        """The verdict, and of how many expectations if not of all."""
        if self.verdict is None:
            return "no verdict"
        return f"{self.verdict} ({self.share})" if self.unjudged else self.verdict

    @property
    def kind(self) -> list[str]:
        """What distinguishes it from others of its claim: its size, chosen arms, changed settings."""
        arms = [f"--arms {','.join(self.chosen)}"] if self.chosen else []
        return [self.size, *arms, *assignments(self.changed)]

    @property
    def size(self) -> str:
        """Scale and number of seeds."""
        return f"{self.scale}, {self.seeds} seed{'s' * (self.seeds != 1)}"

    @property
    def share(self) -> str:
        """How many expectations were judged: ``4 of 5 expectations``."""
        count = len(self.expectations)
        return f"{count} of {count + sum(len(left.names) for left in self.unjudged)} expectations"

    @property
    def left_out(self) -> str:
        """Which expectations were not judged, in a line; empty if all were."""
        return "; ".join(map(str, self.unjudged))

    def folder(self, results: Path) -> Path:
        """Where it stands in a results folder; chosen arms and changed settings have a folder of their own, and replace
        nothing."""
        return results / self.slug / file_name([*self.chosen, *assignments(self.changed)])

    def path(self, results: Path) -> Path:
        """Its JSON in a results folder."""
        return self.folder(results) / f"{self.scale}.json"

    def published(self, results: Path) -> Self | None:
        """What stands there, if it says the same but for the date."""
        try:
            found = self.model_validate_json(self.path(results).read_bytes())
        except (OSError, ValidationError):
            return None
        return found if found == self.model_copy(update={"measured": found.measured}) else None


def summarise(claim: Claim, scale: str, records: Sequence[dict[str, Any]]) -> Summary:
    """Judge a claim by its trials' records, which hold some of its arms, each at every seed."""
    arms = claim.choose({record["arm"] for record in records})
    seeds = sorted({record["seed"] for record in records})
    by_arm = {arm: sorted((r for r in records if r["arm"] == arm), key=lambda r: r["seed"]) for arm in arms}
    table: Table = {
        arm: {name: np.array([r["metrics"][name] for r in rows]) for name in rows[0]["metrics"]}
        for arm, rows in by_arm.items()
    }
    verdicts: list[Verdict] = [expectation.judge(table) for expectation in claim.judged(arms)]
    first = records[0]
    return Summary(
        slug=claim.slug,
        scale=scale,
        seeds=len(seeds),
        verdict=overall(verdicts),
        expectations=[Found(**vars(verdict)) for verdict in verdicts],
        unjudged=_unjudged(claim, arms),
        changed=changed_settings(claim, scale, first["settings"]),
        chosen=[] if arms == claim.arms_at[scale] else list(arms),
        arms={arm: {name: values.tolist() for name, values in metrics.items()} for arm, metrics in table.items()},
        settings=first["settings"],
        device=first["device"],
        versions=first["versions"],
        machine=first["machine"],
        cpu_seconds=round(sum(record["cpu_seconds"] for record in records), 1),
        measured=datetime.now(UTC).date().isoformat(),
        digest="-".join(sorted(record["checksum"][:8] for record in records)),
    )


def changed_settings(claim: Claim, scale: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are not the scale's own."""
    usual = claim.settings.at(scale).model_dump(mode="json")
    return {name: value for name, value in settings.items() if usual.get(name, ...) != value}


def assignments(changed: Mapping[str, Any]) -> list[str]:
    """Settings as ``--set`` takes them."""
    return [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in changed.items()]


def file_name(parts: Sequence[str]) -> str:
    """A short name for some texts, which no others have; empty for none."""
    text = ",".join(parts)
    plain = re.sub(r"[^A-Za-z0-9+=.,_-]+", "-", text)[:60]
    return plain if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _unjudged(claim: Claim, arms: Collection[str]) -> list[Unjudged]:
    """The expectations that name other arms, those together that miss the same."""
    found: dict[tuple[str, ...], Unjudged] = {}
    for expectation in claim.expects:
        if missing := tuple(arm for arm in expectation.arms if arm not in arms):
            scales = [scale for scale in SCALES if expectation in claim.judged(claim.arms_at[scale])]
            left = found.setdefault((*missing, *scales), Unjudged(names=[], missing=list(missing), scales=scales))
            left.names.append(expectation.name or expectation.label)
    return list(found.values())


def read_all(results: Path, *, every: bool = False) -> list[Summary]:
    """The summaries in a results folder, by slug and then by scale.

    Args:
        results: The folder.
        every: Also those of chosen arms and changed settings.

    Raises:
        UserError: If a file is no summary.
    """
    found = []
    for path in sorted(path for pattern in ("*/*.json", "*/*/*.json")[: 1 + every] for path in results.glob(pattern)):
        if path.stem not in SCALES:
            continue
        try:
            found.append(Summary.model_validate_json(path.read_bytes()))
        except ValidationError as error:
            raise UserError(
                f"{path} is no result: {error.errors()[0]['msg']}; check {path.parent.name} again"
            ) from error
    return sorted(found, key=lambda summary: (summary.slug, SCALES.index(summary.scale), summary.kind))


def largest(summaries: Sequence[Summary]) -> dict[str, Summary]:
    """Each claim's summary at the largest scale measured; smoke runs only show that the code works."""
    return {s.slug: s for s in sorted(summaries, key=lambda s: SCALES.index(s.scale)) if s.scale != "smoke"}
