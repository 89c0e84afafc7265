"""What a check found, in numbers: verdicts, arms, settings, machine. Kept as JSON in ``results/``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import BaseModel, ValidationError, field_serializer, field_validator

from paperworks.errors import UserError

from .claim import Claim
from .expectations import Judgement, Table, Verdict, overall
from .settings import SCALES


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


class Summary(BaseModel):
    """All that a report says about one claim at one scale."""

    slug: str
    scale: str
    seeds: int
    verdict: Judgement
    expectations: list[Found]
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
        return {"slug": self.slug, "scale": self.scale, "seeds": self.seeds, "expectations": expectations}

    def path(self, results: Path) -> Path:
        """Where it stands in a results folder."""
        return results / self.slug / f"{self.scale}.json"

    def published(self, results: Path) -> Self | None:
        """What stands there, if it says the same but for the date."""
        try:
            found = self.model_validate_json(self.path(results).read_bytes())
        except (OSError, ValidationError):
            return None
        return found if found == self.model_copy(update={"measured": found.measured}) else None


def summarise(claim: Claim, scale: str, records: Sequence[dict[str, Any]]) -> Summary:
    """Judge a claim by its trials' records, which hold every arm at every seed."""
    seeds = sorted({record["seed"] for record in records})
    by_arm = {arm: sorted((r for r in records if r["arm"] == arm), key=lambda r: r["seed"]) for arm in claim.arms}
    table: Table = {
        arm: {name: np.array([r["metrics"][name] for r in rows]) for name in rows[0]["metrics"]}
        for arm, rows in by_arm.items()
    }
    verdicts: list[Verdict] = [expectation.judge(table) for expectation in claim.expects]
    first = records[0]
    return Summary(
        slug=claim.slug,
        scale=scale,
        seeds=len(seeds),
        verdict=overall(verdicts),
        expectations=[Found(**vars(verdict)) for verdict in verdicts],
        arms={arm: {name: values.tolist() for name, values in metrics.items()} for arm, metrics in table.items()},
        settings=first["settings"],
        device=first["device"],
        versions=first["versions"],
        machine=first["machine"],
        cpu_seconds=round(sum(record["cpu_seconds"] for record in records), 1),
        measured=datetime.now(UTC).date().isoformat(),
        digest="-".join(sorted(record["checksum"][:8] for record in records)),
    )


def read_all(results: Path) -> list[Summary]:
    """Every summary in a results folder, by slug and then by scale.

    Raises:
        UserError: If a file is no summary.
    """
    found = []
    for path in sorted(results.glob("*/*.json")):
        if path.stem not in SCALES:
            continue
        try:
            found.append(Summary.model_validate_json(path.read_bytes()))
        except ValidationError as error:
            raise UserError(
                f"{path} is no result: {error.errors()[0]['msg']}; check {path.parent.name} again"
            ) from error
    return sorted(found, key=lambda summary: (summary.slug, SCALES.index(summary.scale)))


def largest(summaries: Sequence[Summary]) -> dict[str, Summary]:
    """Each claim's summary at the largest scale measured; smoke runs only show that the code works."""
    return {s.slug: s for s in sorted(summaries, key=lambda s: SCALES.index(s.scale)) if s.scale != "smoke"}
