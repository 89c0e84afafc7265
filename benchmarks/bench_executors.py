"""64 short trials on two processes beside the same trials in series.

Bar: 1.7 times as fast. Wall time, so run it on an idle machine of two cores or more. Bound by the start of processes,
a few seconds each to import PyTorch and Lightning Fabric: the shorter the trials, the more that weighs.
"""

import os
import sys
import tempfile
import time

os.environ["OMP_NUM_THREADS"] = "1"

from paperworks.bench import load_claim
from paperworks.bench.check import Plan
from paperworks.bench.executors import execute

TRIALS, EPOCHS = 64, 12


def seconds(executor: str) -> float:
    with tempfile.TemporaryDirectory() as store:
        plan = Plan(scale="smoke", seeds=8, overrides={"epochs": EPOCHS}, device="cpu", store=store)
        trials = plan.trials(load_claim("logitclip"))[:TRIALS]
        begun = time.perf_counter()
        for _ in execute(trials, store, executor, workers=2):
            pass
        return time.perf_counter() - begun


if __name__ == "__main__":
    serial, processes = seconds("serial"), seconds("processes")
    print(
        f"{TRIALS} trials of {serial / TRIALS:.2f} s: {serial:.1f} s in series, {processes:.1f} s on two processes: "
        f"{serial / processes:.2f} × as fast  (bar 1.7 ×)"
    )
    sys.exit(serial / processes < 1.7)
