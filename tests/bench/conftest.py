import json
import multiprocessing
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from joblib.externals.loky import get_reusable_executor

from paperworks.bench import load_claim
from paperworks.bench.check import Plan, Records
from paperworks.cli import main

UNDISTURBED = {}


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line of an error."""
        assert self.err.count("\n") == 1, self.err
        assert "Traceback" not in self.err
        return self.err.strip()


@pytest.fixture(autouse=True)
def plugin(tinyclaims):
    """Every test has the claims of the plug-in, and an empty folder."""


@pytest.fixture
def tiny():
    return load_claim("tiny")


@pytest.fixture
def paperworks(capfd):
    """The command line in this process."""

    def run(*arguments):
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        if "processes" in arguments:  # the next ones must see their own variables
            get_reusable_executor(reuse=True).shutdown(kill_workers=True)
        return Done(ended.value.code, *capfd.readouterr())

    return run


def read(store="paperworks-runs"):
    found = {}
    for path in Path(store).glob("tiny/*/*.json"):
        record = json.loads(path.read_text())
        found[record["arm"], record["seed"]] = record["metrics"], record["curves"], record["artefacts"]
    return found


@pytest.fixture
def stored():
    """What is stored of the trials of ``tiny``."""
    return read


@pytest.fixture
def leftovers():
    """Files that only a fault may leave in a store."""
    places, kinds = ("live",), (".partial", ".pt")
    return lambda: [
        path for path in Path("paperworks-runs").rglob("*") if path.suffix in kinds or path.parent.name in places
    ]


@pytest.fixture
def undisturbed(tiny, tmp_path_factory):
    """What the store of ``check tiny`` holds where nothing went wrong."""
    if not UNDISTURBED:
        store = tmp_path_factory.mktemp("undisturbed")
        plan = Plan(executor="serial", store=str(store))
        for _ in Records(plan, plan.trials(tiny)).measure():
            pass
        UNDISTURBED.update(read(store))
    return dict(UNDISTURBED)


@pytest.fixture
def start():
    """Starts the command line in a process group of its own."""
    started = []

    def run(*arguments):
        command = [sys.executable, "-m", "paperworks", *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, start_new_session=True, **pipes))
        return started[-1]

    yield run
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def forked():
    """Calls functions in copies of this process, at the same time; returns their exit codes."""

    def child(function):
        torch.set_num_threads(1)
        function()

    def call(*functions):
        processes = [multiprocessing.get_context("fork").Process(target=child, args=(f,)) for f in functions]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        return codes

    return call
