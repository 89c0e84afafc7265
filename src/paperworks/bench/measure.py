"""Measures one trial, in whatever process an executor puts it."""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from paperworks import __version__
from paperworks.errors import UserError
from paperworks.train import Intervention

from .claim import Claim, Task, load_claim
from .run import Run
from .store import DamagedRecord, Store, Trial

COMBINE = "combine:"


class TrialFailed(Exception):
    """A trial ended by an error that is not the user's; the message names trial and error."""


def measure(trial: Trial, store_url: str, threads: int = 1, *, fresh: bool = False) -> Trial:
    """Measure a trial and store its record, unless another process has stored it meanwhile.

    Raises:
        UserError: What the user can mend, with the trial's name in front.
        TrialFailed: Anything else.
    """
    store = Store(store_url)
    folder = store.scratch(trial)
    with _alone(folder), _threads(threads):
        if not fresh and _usable(store, trial):
            return trial
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
        live = f"live/{trial.key}.json"

        def report(state: dict[str, Any]) -> None:
            about = {"key": trial.key, "pid": os.getpid(), "code": trial.code, **trial.identity}
            store.write(live, json.dumps(about | state).encode(), durable=False)

        run = Run(
            seed=trial.seed,
            scale=trial.scale,
            device=trial.device,
            data_root=Path(trial.data_root) if trial.data_root else None,
            folder=folder,
            keep=lambda name, content: store.write(store.artefact(trial, name), content),
            report=report,
        )
        run.progress(0.0, "starts")
        begun, begun_cpu = time.perf_counter(), time.process_time()
        try:
            metrics = _checked(_metrics(load_claim(trial.claim), trial, run))
            measured = {
                "metrics": metrics,
                "curves": run.curves,
                "artefacts": run.artefacts,
                "seconds": round(time.perf_counter() - begun, 3),
                "cpu_seconds": round(time.process_time() - begun_cpu, 3),
                "threads": threads,
                **surroundings(),
            }
            store.save(trial, measured)
        except UserError as error:
            raise UserError(f"{trial.claim}, arm {trial.arm}, seed {trial.seed}: {error}") from error
        except Exception as error:
            message = f"{trial.claim}, arm {trial.arm}, seed {trial.seed}: {type(error).__name__}: {error}"
            raise TrialFailed(message) from error
        finally:
            store.remove(live)
        shutil.rmtree(folder, ignore_errors=True)  # while no other process can be measuring in it
    return trial


def _metrics(claim: Claim, trial: Trial, run: Run) -> dict[str, float]:
    settings = claim.settings(**trial.settings)
    if not trial.arm.startswith(COMBINE):
        return claim.trial(run, trial.arm, settings)
    slugs = [slug for slug in trial.arm.removeprefix(COMBINE).split("+") if slug != "none"]

    def interventions(task: Task) -> list[Intervention]:
        return [load_claim(slug).join(task) for slug in slugs]

    return claim.train(run, settings, interventions)


def _checked(metrics: dict[str, float]) -> dict[str, float]:
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise UserError(f"the metric {name} is {value}")
    return {name: float(value) for name, value in metrics.items()}


def _usable(store: Store, trial: Trial) -> bool:
    try:
        return store.load(trial) is not None
    except DamagedRecord:
        return False


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process of this machine at a time measures a trial; a killed one lets go."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f"{folder.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _threads(threads: int) -> Iterator[None]:
    """The same number of threads everywhere, so that sums have the same order and cores are not oversubscribed."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(threads):
            yield
    finally:
        torch.set_num_threads(before)


@cache
def surroundings() -> dict[str, Any]:
    """Versions and machine, as every record states them."""
    packages = ("torch", "torchvision", "lightning-fabric", "numpy", "scikit-learn")
    return {
        "versions": {"paperworks": __version__, "python": platform.python_version()}
        | {name: version(name) for name in packages},
        "machine": {
            "system": platform.system(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
