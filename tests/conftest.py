"""Surroundings of every test: shapes checked, one thread, fixed draws, real data where it lies beside the checkout."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, here and in the tests' subprocesses

import jaxtyping
import pytest
import torch
from hypothesis import settings

from paperworks.catalog import catalog

# Before the first import of these: the hook checks the signatures of what it imports.
jaxtyping.install_import_hook(
    [f"paperworks.{room}" for room in ("nn", "data", "worlds", "robust", "efficient", "search", "detection", "audit")],
    "shapes.check",
)

torch.set_num_threads(1)

# A shell lets what it starts in the background ignore Ctrl-C, and so would what tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("same-every-time", derandomize=True, deadline=None)
settings.load_profile("same-every-time")

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
if DATA.is_dir():
    os.environ.setdefault("PAPERWORKS_DATA", str(DATA))


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Signatures as users have them: for bad input that the code itself must refuse, and for ``torch.compile``."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def tinyclaims(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The claims of tests/bench/plugin, for this process and those it starts, which work in ``tmp_path``."""
    plugin = Path(__file__).parent / "bench" / "plugin"
    monkeypatch.syspath_prepend(plugin)
    monkeypatch.setenv("PYTHONPATH", str(plugin))
    monkeypatch.chdir(tmp_path)
    for variable in ("PAPERWORKS_STORE", "PAPERWORKS_AUTH", "TINY_FAULT", "TINY_TRIALS"):
        monkeypatch.delenv(variable, raising=False)
    catalog.cache_clear()
    yield
    catalog.cache_clear()


@pytest.fixture
def trials(
    tinyclaims: None, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], list[str]]:
    """The trials of those claims that were begun, in whatever process."""
    path = tmp_path_factory.mktemp("trials") / "begun"
    monkeypatch.setenv("TINY_TRIALS", str(path))
    return lambda: path.read_text().splitlines() if path.exists() else []
