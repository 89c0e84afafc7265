"""What the benchmarks share: CPU time (wall time on a GPU) of interleaved rounds, and ratios of them against bars."""

import statistics
import time
from collections.abc import Callable

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def seconds(function: Callable[[], object]) -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    clock = time.perf_counter if DEVICE == "cuda" else time.process_time
    begun = clock()
    function()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return clock() - begun


def interleaved(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each function in each round, after one call to warm up."""
    for function in functions.values():
        function()
    times = [{name: seconds(function) for name, function in functions.items()} for _ in range(rounds)]
    return {name: [row[name] for row in times] for name in functions}


def ratio(above: list[float], below: list[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def compare(one: Callable[[], object], other: Callable[[], object], rounds: int) -> tuple[float, float]:
    """One's time over the other's, and the other's median time in ms."""
    times = interleaved({"one": one, "other": other}, rounds)
    return ratio(times["one"], times["other"]), 1e3 * statistics.median(times["other"])


def verdict(name: str, value: float, *, at_most: float | None = None, at_least: float | None = None) -> bool:
    """Print a ratio beside its bar, if it has one; returns whether it is met."""
    good = (at_most is None or value <= at_most) and (at_least is None or value >= at_least)
    bar = f"at most {at_most}" if at_most is not None else f"at least {at_least}" if at_least is not None else "no bar"
    print(f"{name:56} {value:7.3f}  {bar}  {'' if bar == 'no bar' else 'met' if good else 'MISSED'}", flush=True)
    return good
