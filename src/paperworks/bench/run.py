"""What a trial function is given: seed, device, scratch folder, curves, figures and progress."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.loggers.logger import Logger
from matplotlib.figure import Figure
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from paperworks.errors import UserError
from paperworks.train import Intervention, Trainer


class Run:
    """One trial under way. Everything random in it derives from ``seed``.

    Attributes:
        seed: 0, 1, 2, …
        scale: ``smoke``, ``quick`` or ``full``.
        device: ``cpu`` or ``cuda``.
        data_root: Folder of the data sets, or nothing for the default.
        folder: Scratch folder that survives a kill and is removed once the trial is stored.
        curves: Logged so far: name to list of (step, value).
        trainings: How many trainers this trial will make; set it where that is more than one, so that progress adds up.
    """

    def __init__(
        self,
        *,
        seed: int,
        scale: str,
        device: str,
        data_root: Path | None,
        folder: Path,
        keep: Callable[[str, bytes], None],
        report: Callable[[dict[str, Any]], None] = lambda live: None,
    ) -> None:
        self.seed, self.scale, self.device, self.data_root, self.folder = (
            seed,
            scale,
            device,
            data_root,
            folder,
        )
        self.curves: dict[str, list[tuple[float, float]]] = {}
        self.artefacts: dict[str, str] = {}
        self._keep, self._report, self._last_report = keep, report, 0.0
        self._trainers: set[str] = set()
        self._training: _Epochs | None = None  # the trainer that is at work
        self.trainings = 1

    def generator(self, *names: object) -> torch.Generator:
        """A generator for one purpose: the same for the same seed and names, independent of all others."""
        digest = hashlib.sha256(json.dumps([self.seed, *map(str, names)]).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def trainer(
        self, epochs: int, name: str = "train", *, interventions: Iterable[Intervention] = (), **changed: Any
    ) -> Trainer:
        """A trainer with this run's seed, device, progress, and a checkpoint that a killed trial resumes from."""
        if name in self._trainers:
            raise ValueError(f"this trial has a trainer named {name!r} already; give each its own name")
        index = len(self._trainers)
        self._trainers.add(name)
        options: dict[str, Any] = {
            "seed": self.seed,
            "accelerator": self.device,
            "checkpoint_dir": self.folder / name,
            "progress": lambda fraction, text: self.progress(
                (index + fraction) / max(self.trainings, index + 1), f"{name}: {text}"
            ),
        } | changed
        options["loggers"] = [*options.get("loggers", ()), _Epochs(self)]
        return Trainer(epochs, interventions=interventions, **options)

    def progress(self, fraction: float, text: str = "") -> None:
        """Say how far the trial is; cheap enough for every step."""
        if (now := time.monotonic()) - self._last_report >= 0.5:
            self._last_report = now
            training = self._training.curves if self._training else {}
            live = {"text": text, "curves": self.curves, "training": training}
            self._report({"fraction": round(min(max(fraction, 0.0), 1.0), 4), **live})

    def log(self, step: float, **values: float) -> None:
        """Add points to curves; names with slashes can be given as ``**{"train/loss": 0.1}``."""
        for name, value in values.items():
            if math.isfinite(value):
                self.curves.setdefault(name, []).append((float(step), float(value)))

    def figure(self, name: str, figure: Figure) -> None:
        """Keep a matplotlib figure for the report, as PNG."""
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
        self._artefact(name, "png", buffer.getvalue())
        figure.clear()

    def save(self, name: str, content: bytes | str | dict[str, Tensor] | Any) -> None:
        """Keep an artefact: bytes and text as they are, tensors by name as safetensors, else JSON."""
        if isinstance(content, bytes):
            self._artefact(name, "bin", content)
        elif isinstance(content, str):
            self._artefact(name, "txt", content.encode())
        elif isinstance(content, dict) and content and all(isinstance(v, Tensor) for v in content.values()):
            self._artefact(name, "safetensors", safetensors_bytes(content))
        else:
            self._artefact(name, "json", json.dumps(content, indent=1).encode())

    def _artefact(self, name: str, suffix: str, content: bytes) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 _-]*", name):
            raise UserError(f"artefact name {name!r} must consist of letters, digits, spaces, _ and -")
        file = f"{name.replace(' ', '-')}.{suffix}"
        self._keep(file, content)
        self.artefacts[file] = hashlib.sha256(content).hexdigest()


class _Epochs(Logger):
    """What a trainer reports of its epochs, for who looks at the run while it goes on."""

    name, version = "live", 0

    def __init__(self, run: Run) -> None:
        self.run = run
        self.curves: dict[str, list[tuple[float, float]]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.run._training = self
        if "epoch" in metrics:  # and not of a step
            for name, value in metrics.items():
                if name != "epoch" and math.isfinite(value):
                    self.curves.setdefault(name, []).append((float(metrics["epoch"] + 1), float(value)))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the settings stand in the record."""
