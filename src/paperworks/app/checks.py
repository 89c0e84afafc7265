"""Runs: started from a method's page, watched while they go on, stopped, resumed, read afterwards."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import RedirectResponse, Response

from paperworks.bench import Claim, load_claim
from paperworks.bench.check import Plan
from paperworks.bench.measure import COMBINE
from paperworks.bench.store import Trial
from paperworks.catalog import catalog
from paperworks.errors import UserError

from .charts import effects, forest, interactions, panels, strips
from .gallery import method_page, pictures
from .orders import ACTIVE, Order
from .runs import StoredRun, common_of, run_of
from .site import Site
from .watch import watch

BETWEEN = 3.0  # seconds in which the command line may be between two trials


def router(site: Site) -> APIRouter:
    """Starting, watching, stopping, resuming."""
    pages = APIRouter()

    @pages.get("/runs")
    def runs(request: Request) -> Response:
        there = site.runs.all()
        known = {run.id for run in there}
        asked = [planned(order) for order in site.orders.all() if order.run not in known and order.active]
        for run in there:
            run.planned = order.arms if (order := site.orders.get(run.id)) else ()
        rows = [{"run": run, **standing(site, run)} for run in [*asked, *there]]
        stored = {run.summary.digest for run in there if run.summary}
        published = [s for slug in catalog() for s in site.project.summaries(slug).values() if s.digest not in stored]
        return site.page(
            request,
            "runs.html",
            rows=rows,
            published=published,
            damaged=site.runs.damaged,
            store=site.project.store,
            results=site.project.results,
        )

    @pages.post("/methods/{slug}/check")
    async def check(request: Request, slug: str) -> Response:
        if slug not in catalog():
            raise HTTPException(404, f"there is no method {slug!r}")
        form = await texts(request)
        try:
            order = await run_in_threadpool(ordered, site, [slug], None, form)
        except UserError as mistake:
            error = " ".join(str(mistake).split())
            return await run_in_threadpool(method_page, site, request, slug, "", error, form)
        await run_in_threadpool(site.orders.start, order)
        return RedirectResponse(f"/runs/{order.run}", 303)

    @pages.get("/runs/{slug}/{scale}/{digest}")
    def run(request: Request, slug: str, scale: str, digest: str) -> Response:
        found = find(site, f"{slug}/{scale}/{digest}")
        order = site.orders.get(found.id)
        summary = found.summary
        published = site.project.summary(slug, scale)
        combination = found.combination(site.project.store) if found.is_combination else None
        return site.page(
            request,
            "run.html",
            run=found,
            card=catalog()[slug],
            summary=summary,
            rows=forest(summary.expectations) if summary else [],
            strips=strips(summary.arms) if summary else {},
            combination=combination,
            effects=effects(combination) if combination else [],
            interactions=interactions(combination) if combination else [],
            pictures=pictures(site, published) if summary and published and published.digest == summary.digest else [],
            output=site.orders.output(found.id) if order else "",
            command=shlex.join(["paperworks", *order.arguments]) if order else "",
            **live(site, found),
        )

    @pages.get("/runs/{slug}/{scale}/{digest}/events")
    def events(request: Request, slug: str, scale: str, digest: str) -> Response:
        id = f"{slug}/{scale}/{digest}"
        find(site, id)

        def look() -> tuple[bool, str]:
            found = live(site, find(site, id))
            return found["state"] in ACTIVE, site.part("live.html", **found)

        return watch(site, request, look)

    @pages.post("/runs/{slug}/{scale}/{digest}/{action}")
    def act(slug: str, scale: str, digest: str, action: str) -> Response:
        found = find(site, f"{slug}/{scale}/{digest}")
        if action == "cancel":
            site.orders.cancel(found.id)
        elif action == "resume":
            site.orders.resume(found.id)
        else:
            raise HTTPException(404)
        return RedirectResponse(f"/runs/{found.id}", 303)

    return pages


async def texts(request: Request) -> dict[str, str]:
    """The fields of a form that are text; one given several times as its values joined by blanks."""
    async with request.form(max_fields=300, max_files=1) as form:
        found: dict[str, str] = {}
        for name, value in form.multi_items():
            if isinstance(value, str):
                found[name] = f"{found[name]} {value.strip()}" if name in found else value.strip()
        return found


def ordered(site: Site, slugs: list[str], on: str | None, form: Mapping[str, str]) -> Order:
    """What a form asks for.

    Raises:
        UserError: If it cannot be measured so.
    """
    project = site.project
    settings = {name.removeprefix("set-"): value for name, value in form.items() if name.startswith("set-") and value}
    for name, value in settings.items():
        project.refuse_outside(name, value)
    options = {name: form.get(name, "") for name in ("scale", "seeds", "device")}
    if options["seeds"] and not re.fullmatch(r"[0-9]{1,4}", options["seeds"]):
        raise UserError(f"seeds must be a number, got {options['seeds']!r}")
    plan = Plan(
        scale=options["scale"] or "quick",
        seeds=int(options["seeds"]) if options["seeds"] else None,
        overrides=settings,
        device=options["device"] or "auto",
        data_root=project.data_root,
        store=project.store,
    )
    claim = load_claim(on or slugs[0])
    trials = _factorial(plan, claim, slugs) if on else plan.trials(claim)
    common = common_of(vars(trials[0]))
    head = ["combine", *slugs, "--on", on] if on else ["check", *slugs]
    places = {"store": project.store, "results": str(project.results), "data-root": str(project.data_root or "")}
    named = [f"--{name}={value}" for name, value in (options | places).items() if value]
    return Order(
        run=run_of(common),
        arguments=(
            *head,
            *named,
            *(f"--set={name}={value}" for name, value in settings.items()),
            *(["--fresh"] if form.get("fresh") else []),
        ),
        common=common,
        arms=tuple(dict.fromkeys(trial.arm for trial in trials)),
        seeds=len({trial.seed for trial in trials}),
    )


def _factorial(plan: Plan, claim: Claim, slugs: list[str]) -> list[Trial]:
    from paperworks.bench.combine import check_methods

    check_methods(slugs)
    claim.check_host()
    joining = [load_claim(slug) for slug in slugs]
    for method in joining:
        method.check_joins()
    return plan.factorial(claim, joining)


def find(site: Site, id: str) -> StoredRun:
    """A run that is stored, lives or was asked for; else the error of an unknown page."""
    order = site.orders.get(id)
    slug, scale, _ = id.split("/")
    if slug not in catalog() or scale not in ("smoke", "quick", "full"):
        raise HTTPException(404, "there is no such run")
    found = site.runs.get(id) or (planned(order) if order else None)
    if found is None:
        raise HTTPException(404, "there is no such run")
    if order:
        found.planned = order.arms
    return found


def planned(order: Order) -> StoredRun:
    """A run of which nothing is measured yet."""
    return StoredRun(order.common, order.arms, changed=order.changed)


def standing(site: Site, run: StoredRun) -> dict[str, Any]:
    """Where a run stands: its state, how many trials are done, of how many."""
    order = site.orders.get(run.id)
    arms, asked = run.arms, set(run.arms)
    if not run.is_combination:
        own = run.claim.arms_at[run.scale]
        arms = list(dict.fromkeys([*own, *arms]))
        asked = {*own, *run.planned, *(trial["arm"] for trial in run.live)}
    between = order is None and time.time() - run.changed < BETWEEN
    usual = run.claim.seeds[run.scale] if run.live else 0
    seeds = max(run.seeds, usual) if order is None else max(order.seeds, run.seeds if not order.active else 0)
    done = sum(record["seed"] < seeds for record in run.records)
    more = sum(record["seed"] < seeds and record["arm"] not in asked for record in run.records)
    total = len(asked) * seeds + more  # arms beyond the scale's count as far as they are measured
    if order is not None and order.active:
        state = order.status
    elif run.live:
        state = "running"
    elif done >= total:
        state = "done"
    elif between:
        state = "running"
    else:
        state = order.status if order is not None and order.status != "done" else "stopped"
    fraction = (done + sum(float(trial.get("fraction", 0)) for trial in run.live)) / total if total else 0.0
    return {
        "state": state,
        "done": done,
        "total": total,
        "fraction": min(fraction, 1.0),
        "arms": arms,
        "seeds": seeds,
        "here": order is not None,
        "message": order.message if order is not None and state == "failed" else "",
    }


def live(site: Site, run: StoredRun) -> dict[str, Any]:
    """What changes while a run goes on: trials and curves."""
    stands = standing(site, run)
    trials = {(record["arm"], record["seed"]): {"done": True} for record in run.records}
    trials |= {
        (trial["arm"], trial["seed"]): {"done": False, "fraction": trial["fraction"], "text": trial["text"]}
        for trial in run.live
    }
    order = [label(arm) for arm in stands["arms"]]
    return stands | {
        "trials": trials,
        "label": label,
        "order": order,
        "curves": panels(_labelled(run.curves()), order),
        "training": panels(_labelled(run.curves("training")), order) if run.live else [],
    }


def label(arm: str) -> str:
    """An arm as people read it."""
    return arm.removeprefix(COMBINE).replace("+", " + ") if arm.startswith(COMBINE) else arm


def _labelled(curves: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: {label(arm): runs for arm, runs in by_arm.items()} for name, by_arm in curves.items()}
