"""How soon the command line answers, beside a bare Python that imports click.

Run: python benchmarks/cli.py
"""

import statistics
import subprocess
import sys
import time

REPEATS = 11
COMMANDS = {
    "python, import click": [sys.executable, "-c", "import click"],
    "paperworks --help": [sys.executable, "-m", "paperworks", "--help"],
    "paperworks --version": [sys.executable, "-m", "paperworks", "--version"],
    "paperworks list": [sys.executable, "-m", "paperworks", "list"],
    "paperworks show logitclip": [sys.executable, "-m", "paperworks", "show", "logitclip"],
}


def main() -> None:
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(REPEATS):
        for name, command in COMMANDS.items():
            begun = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - begun)
    bare = statistics.median(seconds["python, import click"])
    print(f"{'command':<28}{'seconds':>10}{'ratio':>8}   (bar: 0.3 s)")
    for name, values in seconds.items():
        print(f"{name:<28}{statistics.median(values):>10.3f}{statistics.median(values) / bare:>8.2f}")
    print("Bound: starting Python and importing click; reading the catalog is a few milliseconds.")


if __name__ == "__main__":
    main()
