import multiprocessing
import time

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset


@pytest.fixture
def data():
    """Twenty examples of four figures in three classes."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(20, 4, generator=generator)
    return TensorDataset(inputs, inputs[:, :3].argmax(1))


@pytest.fixture
def network():
    """Makes the same network every time, with dropout if asked."""

    def make(dropout=0.0):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3))

    return make


@pytest.fixture
def forked():
    """Calls a function in a copy of this process; returns its exit code, -9 if it was killed."""

    def start(function):
        def child():
            torch.set_num_threads(1)
            function()

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        started.append(process)
        return process

    def call(*functions):
        processes = [start(function) for function in functions]
        end = time.monotonic() + 60
        # Not by joining, which also waits for a killed process's workers, and these notice its end after seconds.
        while any(process.exitcode is None for process in processes) and time.monotonic() < end:
            time.sleep(0.01)
        codes = [process.exitcode for process in processes]
        return codes[0] if len(codes) == 1 else codes

    started = []
    yield call
    for process in started:
        if process.is_alive():
            process.kill()
