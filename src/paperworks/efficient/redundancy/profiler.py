"""The profiler: where in a model, and in which way, the work that data cause is redundant."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from paperworks.errors import UserError, unknown
from paperworks.nn import keeping_modes, removing

from .clusters import check_bits
from .looks import InputLook, Look, Options, look, lookable
from .measures import check_finite
from .report import INPUT, RedundancyReport, Row


class RedundancyProfiler:
    """Runs a model on data and measures each class of redundancy in each layer where it can occur.

    Looked at are the inputs of ``nn.Conv2d`` (R2, R3, R5, R9) and ``nn.Linear`` (R2, R9), the outputs of ``nn.Conv2d``
    (R6), the tokens of ``nn.MultiheadAttention`` (R7), and the model's own input (R1, R4, R8, R9). A layer is measured
    on at most ``rows`` vectors, drawn at random, so that its cost stays near that of the forward pass. Of few vectors
    fewer share a cluster, so that R2 is a lower bound.

    Redundancy is one of data *and* model: quote no figure without both.

    Args:
        model: The model; it runs in evaluation mode, and everything of it is left as it was.
        layers: Names of layers to look at; by default all of the kinds above.
        rows: Vectors a layer.
        bits: Bits of a signature (R2).
        tau: Change of a pixel, or mean change of a frame, up to which it counts as unchanged (R4, R5).
        tile: Side of a tile (R3).
        seed: Draws the vectors.

    Raises:
        UserError: If an argument is out of range, a layer unknown, or the model has none that can be looked at.

    Example:
        >>> report = RedundancyProfiler(model).run(loader)
        >>> print(report.to_frame())
        >>> print(report.recommend())
        >>> report.plot().savefig("redundancy.png")
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[str] | None = None,
        *,
        rows: int = 20_000,
        bits: int = 12,
        tau: float = 0.02,
        tile: int = 8,
        seed: int = 0,
    ) -> None:
        check_bits(bits)
        if rows < 2 or tile < 1:
            raise UserError(f"rows must be at least 2 and tile at least 1, got {rows} and {tile}")
        if not tau >= 0:
            raise UserError(f"tau must be at least 0, got {tau}")
        known = lookable(model.named_modules())
        if not known:
            raise UserError(f"{type(model).__name__} has no nn.Conv2d, nn.Linear or nn.MultiheadAttention to look at")
        names = list(known) if layers is None else list(layers)
        for name in names:
            if name not in known:
                raise unknown("layer", name, known)
        self.model, self.layers = model, {name: known[name] for name in names}
        self.rows, self.bits, self.tau, self.tile, self.seed = rows, bits, tau, tile, seed

    @torch.no_grad()
    def run(self, data: Iterable[Any], *, temporal: bool = False) -> RedundancyReport:
        """Measure on data.

        Args:
            data: Batches, each a tensor of inputs or a sequence that begins with one, as data loaders give them. A
                tensor by itself is one batch.
            temporal: The examples are consecutive frames of one video: measure R4 and R5 too.

        Raises:
            UserError: If there are no data, frames differ in size, or an activation is not finite (its layer is named).
        """
        draw = torch.Generator().manual_seed(self.seed)
        options = Options(self.rows, self.bits, self.tau, self.tile, temporal, draw)
        looks = {name: look(module, options) for name, module in self.layers.items()}
        own = InputLook(options)
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        with _hooked(self.model, {name: (self.layers[name], seen) for name, seen in looks.items()}):
            for batch in [data] if isinstance(data, Tensor) else data:
                inputs = (batch if isinstance(batch, Tensor) else batch[0]).to(device)
                if len(inputs):
                    check_finite(inputs, "inputs")
                    own.see(inputs, inputs)
                    self.model(inputs)
        if not own.examples:
            raise UserError("the data are empty: the profiler needs at least one batch")
        rows = [
            Row(name, found.kind, found.value, found.cost, seen.bytes, seen.macs, found.error)
            for name, seen in {INPUT: own, **looks}.items()
            if seen.calls
            for found in seen.findings()
        ]
        return RedundancyReport(type(self.model).__name__, own.examples, rows)


@contextmanager
def _hooked(model: nn.Module, looks: dict[str, tuple[nn.Module, Look]]) -> Iterator[None]:
    """Let the layers be seen, in evaluation mode, and leave everything as it was."""
    fast = torch.backends.mha.get_fastpath_enabled()
    handles: list[RemovableHandle] = []

    def hook(name: str, seen: Look) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            check_finite(x, f"layer {name!r}: its input")
            seen.see(x, output[0] if isinstance(output, tuple) else output)

        return see

    try:
        with removing(handles), keeping_modes(model):
            model.eval()
            torch.backends.mha.set_fastpath_enabled(False)  # which calls no layer within an encoder
            for name, (module, seen) in looks.items():
                handles.append(module.register_forward_hook(hook(name, seen), with_kwargs=True))
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
