import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from paperworks.bench import load_claim
from paperworks.catalog import catalog
from paperworks.cli import main

PLUGIN = Path(__file__).parent / "plugin"


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
def plugin(monkeypatch, tmp_path):
    """The claims of tests/bench/plugin, for this process and those it starts, which work in ``tmp_path``."""
    monkeypatch.syspath_prepend(PLUGIN)
    monkeypatch.setenv("PYTHONPATH", str(PLUGIN))
    monkeypatch.chdir(tmp_path)
    for variable in ("PAPERWORKS_STORE", "TINY_FAULT", "TINY_TRIALS"):
        monkeypatch.delenv(variable, raising=False)
    catalog.cache_clear()
    yield
    catalog.cache_clear()


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
        return Done(ended.value.code, *capfd.readouterr())

    return run


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
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
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
