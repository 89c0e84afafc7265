"""What the profiler gathers of one layer, or of the model's input, while batches pass by."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from paperworks.errors import UserError

from .delta import delta_cost, reached
from .gating import gate_cost
from .layers import check_convolution
from .measures import (
    channel_redundancy,
    duplicate_redundancy,
    lsh_redundancy,
    share,
    spectral_redundancy,
    token_redundancy,
    value_redundancy,
    zero_redundancy,
)
from .patches import Patches
from .reuse import predicted_cost

ESCALATES = 0.9
"""An image with a smaller share of its energy at low frequencies is taken to need full resolution (R1)."""
SAMPLES = 1024
"""Examples that are compared with one another (R8)."""
VALUES = 1 << 17
"""Values of a layer in the histogram (R9)."""


class Options(NamedTuple):
    """The profiler's settings."""

    rows: int
    bits: int
    tau: float
    tile: int
    temporal: bool
    draw: torch.Generator


class Finding(NamedTuple):
    """One class of redundancy in one place: how much there is, and the predicted cost over the dense one."""

    kind: str
    value: float
    cost: float
    error: float | None = None  # of the layer's input, where the technique approximates it


class Sample:
    """Rows drawn at random from the first batches, until there are enough."""

    def __init__(self, size: int, draw: torch.Generator) -> None:
        self.size, self.draw, self.parts, self.count = size, draw, list[Tensor](), 0

    def places(self, available: int) -> Tensor:
        """Which of the new rows to add: of one batch no more than a quarter of all, unless batches are few."""
        wanted = min(self.size - self.count, max(self.size // 4, 1))
        return torch.randperm(available, generator=self.draw)[:wanted].sort().values

    def add(self, rows: Tensor) -> None:
        """Keep rows."""
        if len(rows):
            self.parts.append(rows.float().cpu())
            self.count += len(rows)

    def all(self) -> Tensor:
        """The rows."""
        return torch.cat(self.parts)


class Mean:
    """A running mean, weighted."""

    def __init__(self) -> None:
        self.total = self.weight = 0.0

    def add(self, value: float, weight: float) -> None:
        """One more value."""
        self.total, self.weight = self.total + weight * value, self.weight + weight

    @property
    def value(self) -> float:
        """The mean so far; nothing has none."""
        return self.total / self.weight if self.weight else math.nan


class Look:
    """What every place has: its values' histogram (R9), bytes and multiply-accumulates."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.calls = self.macs = self.bytes = 0
        self.values = Sample(VALUES, options.draw)

    def see(self, x: Tensor, y: Tensor) -> None:
        """Look at one call's input and output."""
        self.calls += 1
        self.bytes += x.numel() * x.element_size()
        step = max(1, 4 * x.numel() // VALUES)
        self.values.add(x.flatten()[::step][: VALUES - self.values.count])

    def findings(self) -> Iterator[Finding]:
        """What was found."""
        found = value_redundancy(self.values.all()).redundancy
        yield Finding("R9", found, 1 - found)


class InputLook(Look):
    """The model's input: resolution (R1), frames (R4), samples (R8)."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.examples, self.kept = 0, list[Tensor]()
        self.spectral, self.escalating, self.still = Mean(), Mean(), Mean()
        self.last: Tensor | None = None

    def see(self, x: Tensor, y: Tensor) -> None:
        super().see(x, y)
        if self.examples < SAMPLES:
            self.kept.append(x[: SAMPLES - self.examples].float().cpu())
        if x.ndim == 4 and x.is_floating_point() and min(x.shape[-2:]) >= 4:
            for image in x[:SAMPLES]:
                found = spectral_redundancy(image)
                self.spectral.add(found, 1)
                self.escalating.add(found < ESCALATES, 1)
        if self.options.temporal:
            if self.last is not None and self.last.shape[1:] != x.shape[1:]:
                raise UserError(
                    f"frame {self.examples} is {x.shape[-1]}x{x.shape[-2]}, "
                    f"clip is {self.last.shape[-1]}x{self.last.shape[-2]}"
                )
            frames = x if self.last is None else torch.cat([self.last, x])
            change = (frames[1:] - frames[:-1]).abs().flatten(1).mean(1)
            self.still.add(share(change <= self.options.tau) if len(change) else 0.0, len(change))
            self.last = x[-1:].clone()
        self.examples += len(x)

    def findings(self) -> Iterator[Finding]:
        if self.spectral.weight:
            yield Finding("R1", self.spectral.value, 0.25 + self.escalating.value)
        if self.still.weight:
            yield Finding("R4", self.still.value, 1 - self.still.value)
        if len({part.shape[1:] for part in self.kept}) == 1:
            near = duplicate_redundancy(torch.cat(self.kept)).near
            yield Finding("R8", near, 1 - near)
        yield from super().findings()


class ConvLook(Look):
    """A convolution: vectors (R2), empty regions (R3), unchanged pixels (R5), channels (R6)."""

    def __init__(self, conv: nn.Conv2d, options: Options) -> None:
        super().__init__(options)
        self.conv = conv
        self.vectors, self.channels = Sample(options.rows, options.draw), Sample(options.rows, options.draw)
        self.empty_tiles, self.changed, self.active = Mean(), Mean(), Mean()
        self.last: Tensor | None = None
        try:
            self.plain = bool(check_convolution(conv, "R2"))
        except UserError:  # grouped, or padded otherwise: no technique of ours computes it
            self.plain = False

    def see(self, x: Tensor, y: Tensor) -> None:
        super().see(x, y)
        self.macs += y.numel() * self.conv.weight[0].numel()
        n, height, width = y.shape[0], *y.shape[2:]
        image, row, column = torch.unravel_index(self.channels.places(n * height * width), (n, height, width))
        self.channels.add(y[image.to(y.device), :, row.to(y.device), column.to(y.device)])
        if not self.plain:
            return
        patches = Patches.of(self.conv, x.shape)
        places = self.vectors.places(patches.outputs).to(x.device)
        if len(places):
            self.vectors.add(patches.gather(patches.pixels(x), places))
        halo = max(self.conv.kernel_size) // 2
        self.empty_tiles.add(zero_redundancy(x, self.options.tile, halo).tiles, len(x))
        if self.options.temporal:
            frames = x if self.last is None else torch.cat([self.last, x])
            if len(frames) > 1:
                change = (frames[1:] - frames[:-1]).abs().amax(1) > self.options.tau
                self.changed.add(share(change), len(change))
                self.active.add(share(reached(self.conv, change)), len(change))
            self.last = x[-1:].clone()

    def findings(self) -> Iterator[Finding]:
        out, bits = self.conv.out_channels, self.options.bits
        if self.vectors.count:
            found = lsh_redundancy(self.vectors.all(), bits)
            yield Finding("R2", found.redundancy, predicted_cost(bits, out, found.cluster_ratio), found.error)
            yield Finding("R3", self.empty_tiles.value, 1 - self.empty_tiles.value)
        if self.changed.weight:
            yield Finding("R5", 1 - self.changed.value, delta_cost(out, self.active.value))
        channels = channel_redundancy(self.channels.all())
        yield Finding("R6", channels.redundancy, gate_cost(out, channels.effective_rank / out))
        yield from super().findings()


class LinearLook(Look):
    """A linear layer: vectors (R2)."""

    def __init__(self, linear: nn.Linear, options: Options) -> None:
        super().__init__(options)
        self.linear, self.vectors = linear, Sample(options.rows, options.draw)

    def see(self, x: Tensor, y: Tensor) -> None:
        super().see(x, y)
        self.macs += y.numel() * self.linear.in_features
        rows = x.reshape(-1, x.shape[-1])
        self.vectors.add(rows[self.vectors.places(len(rows)).to(x.device)])

    def findings(self) -> Iterator[Finding]:
        found = lsh_redundancy(self.vectors.all(), self.options.bits)
        cost = predicted_cost(self.options.bits, self.linear.out_features, found.cluster_ratio)
        yield Finding("R2", found.redundancy, cost, found.error)
        yield from super().findings()


class AttentionLook(Look):
    """Attention: its tokens (R7)."""

    def __init__(self, attention: nn.MultiheadAttention, options: Options) -> None:
        super().__init__(options)
        self.attention, self.alike, self.mergeable = attention, Mean(), Mean()

    def see(self, x: Tensor, y: Tensor) -> None:
        super().see(x, y)
        tokens = x if self.attention.batch_first else x.transpose(0, 1)
        n, t, d = tokens.shape
        self.macs += n * t * d * (4 * d + 2 * t)
        if t > 1:
            found = token_redundancy(tokens)
            self.alike.add(found.redundancy, n)
            self.mergeable.add(found.mergeable, n)

    def findings(self) -> Iterator[Finding]:
        if self.alike.weight:
            yield Finding("R7", self.alike.value, 1 - self.mergeable.value)
        yield from super().findings()


KINDS: dict[type[nn.Module], Any] = {
    nn.Conv2d: ConvLook,
    nn.Linear: LinearLook,
    nn.MultiheadAttention: AttentionLook,
}
"""How each kind of layer is looked at."""


def lookable(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, nn.Module]:
    """The layers that can be looked at, by name. Attention calls its output projection by other ways."""
    found = {name: module for name, module in modules if isinstance(module, tuple(KINDS))}
    hidden = {id(module.out_proj) for module in found.values() if isinstance(module, nn.MultiheadAttention)}
    return {name or "(model)": module for name, module in found.items() if id(module) not in hidden}


def look(module: nn.Module, options: Options) -> Look:
    """The look at a layer."""
    return next(make for kind, make in KINDS.items() if isinstance(module, kind))(module, options)
