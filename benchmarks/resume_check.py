"""What ``paperworks check`` takes when every trial is stored, beyond the imports that it needs.

Bar: 1 s. CPU time of fresh processes, interleaved, medians. Bound by reading, hashing and judging one small JSON a
trial: nothing is trained and nothing is drawn again.
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROUNDS, SEEDS = 5, 5
CHECK = ["-m", "paperworks", "check", "logitclip", "--scale", "smoke", "--seeds", str(SEEDS)]
IMPORTS = ["-c", "import paperworks.bench.report, paperworks.claims.robust.logitclip"]


def cpu_seconds(arguments: list[str], folder: str) -> float:
    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = used()
    subprocess.run([sys.executable, *arguments], cwd=folder, check=True, capture_output=True)
    return used() - before


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        cpu_seconds(CHECK, folder)
        trials = len(list(Path(folder).glob("paperworks-runs/logitclip/smoke/*.json")))
        pairs = [(cpu_seconds(CHECK, folder), cpu_seconds(IMPORTS, folder)) for _ in range(ROUNDS)]
    beyond = statistics.median(check - imports for check, imports in pairs)
    imports = statistics.median(imports for _, imports in pairs)
    print(f"check of {trials} stored trials: {beyond:.2f} s beyond imports ({imports:.1f} s)  (bar 1 s)")
    sys.exit(beyond > 1)
