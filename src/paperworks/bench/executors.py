"""Where trials run: in this process, in several, or on a Ray cluster; all of it joblib's."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Generator, Iterator, Sequence
from typing import Any, Literal, get_args

from joblib import Parallel, delayed, parallel_config

from paperworks.errors import MissingExtra

from .measure import measure
from .store import Trial

Executor = Literal["serial", "processes", "ray"]
EXECUTORS: tuple[str, ...] = get_args(Executor)


def execute(
    trials: Sequence[Trial],
    store_url: str,
    executor: str = "processes",
    *,
    workers: int | None = None,
    threads: int = 1,
    fresh: bool = False,
) -> Iterator[Trial]:
    """Measure trials and yield each when its record is stored, in any order.

    Args:
        trials: What to measure.
        store_url: Where records go.
        executor: ``serial``, ``processes`` (loky) or ``ray`` (the cluster at ``RAY_ADDRESS``, else one started here).
        workers: Trials at a time; the default is one a core (for Ray, what the cluster has).
        threads: Threads a trial. Sums depend on it in their last bits, so it stays 1 unless asked.
        fresh: Measure trials whose record is there as well.

    Raises:
        UserError: At the first trial that fails by it; what was stored stays.
    """
    cores = max(1, (os.cpu_count() or 1) // threads)
    options: dict[str, Any]
    if executor == "ray":
        _register_ray()
        options = {"backend": "ray", "n_jobs": workers or -1}
    elif executor == "processes" and len(trials) > 1:
        options = {
            "backend": "loky",
            "n_jobs": min(workers or cores, len(trials)),
            "inner_max_num_threads": threads,
        }
    else:
        options = {"backend": "sequential", "n_jobs": 1}
    with parallel_config(**options):
        returns = "list" if executor == "ray" else "generator_unordered"  # joblib's Ray backend has no generators
        run = Parallel(return_as=returns, batch_size=1, pre_dispatch="all")
        results = run(delayed(measure)(trial, store_url, threads, fresh=fresh) for trial in trials)
        try:
            for trial in results:  # noqa: UP028 - "yield from" would close joblib's generator before we can
                yield trial
        finally:
            if isinstance(results, Generator):
                with warnings.catch_warnings(action="ignore"):  # joblib tells what it cancels when we leave early
                    results.close()


def _register_ray() -> None:
    try:
        import ray
        from ray.util.joblib import register_ray
    except ImportError as error:
        raise MissingExtra("ray", "ray", "the executor 'ray'") from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    register_ray()  # type: ignore[no-untyped-call]
