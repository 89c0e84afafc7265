"""DDG's constraint and augmentation on somebody else's classifier."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam

from paperworks.errors import UserError
from paperworks.train import Intervention, State

from .constraint import partners, reconstruction_violation, swap
from .dual import DualVariable
from .networks import SwapDecoder, VariationEncoder
from .pairs import same_class_positives


class SwapConstraint(Intervention):
    r"""Stage 1 of DDG on any image classifier that ends in a linear layer.

    What that layer is fed counts as semantics $s(x)$. During the first ``warmup`` of the steps, a variation encoder
    and a decoder learn to rebuild images from the semantics of others of their class, which they do not change; this
    stands in for stage 0, without its adversary and cycle. From then on the loss is

    $$\ell + \lambda\,\tfrac1N\sum_i \max\big(0,\ d(x_i, D(v(x_i), s(x'_i))) - \gamma\big) + w\,\ell_{\text{swaps}}.$$

    Positives $x'$ are drawn from the batch; an image that is alone in its class there is its own. Swaps are made by a
    frozen copy of the networks as they were after the warm-up, and left out if those rebuilt images no better than
    ``augment_below``. Soft targets count as their largest class when positives are drawn. The swaps pass through the
    model in training mode, and so through its batch statistics.

    Args:
        input_shape: ``(channels, height, width)`` of the images; the sides multiples of 4.
        num_classes: Outputs of the linear layer.
        seed: Of the draws, and of the first weights of $v$ and $D$.
        code: Length of $v(x)$.
        width: Channels of the decoder's smallest map.
        multiplier: $\lambda$ and $\gamma$, the latter in the units of the pixels.
        augment_weight: $w$; 0 leaves the swaps out.
        augment_below: See above, in the units of the pixels.
        warmup: Share of the steps without constraint and swaps.
        generator_lr: Adam's rate for $v$ and $D$.
        head: Name of the linear layer in the model; by default the last one with ``num_classes`` outputs.

    Example:
        >>> Trainer(epochs=40, interventions=[SwapConstraint((1, 28, 28), num_classes=10)])
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_classes: int,
        *,
        seed: int = 0,
        code: int = 16,
        width: int = 64,
        multiplier: DualVariable | None = None,
        augment_weight: float = 0.5,
        augment_below: float = 0.1,
        warmup: float = 0.3,
        generator_lr: float = 1e-3,
        head: str | None = None,
    ) -> None:
        if len(input_shape) != 3:
            raise UserError(f"input_shape must be (channels, height, width), got {tuple(input_shape)}")
        if not 0 < warmup < 1:
            raise UserError(f"warmup must be between 0 and 1, got {warmup}")
        for name, value in {"augment_weight": augment_weight, "augment_below": augment_below}.items():
            if not value >= 0:
                raise UserError(f"{name} must not be negative, got {value}")
        self.shape, self.num_classes = (input_shape[0], input_shape[1], input_shape[2]), num_classes
        self.code, self.width, self.generator_lr, self.head = code, width, generator_lr, head
        self.augment_weight, self.augment_below, self.warmup = augment_weight, augment_below, warmup
        self.multiplier = multiplier or DualVariable()
        self.random = torch.Generator().manual_seed(seed)

    def setup(self, state: State) -> None:
        self.module, device = state.module, state.fabric.device
        self.tap = _Tap(self.module, self.num_classes, self.head)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (), generator=self.random)))
            self.generator = _Generator(self.code, self.tap.features, self.shape, self.width)
        self.wrapped = state.fabric.setup_module(self.generator)
        self.optimizer = Adam(self.generator.parameters(), lr=self.generator_lr)
        self.multiplier.to(device)
        self.error = torch.tensor(torch.inf, device=device)  # running mean of the distance
        self.frozen: _Swapper | None = None
        self.augments = False

    def on_batch(self, state: State) -> None:
        if tuple(state.inputs.shape[1:]) != self.shape:
            raise UserError(f"images must have shape {self.shape}, got {tuple(state.inputs.shape[1:])}")
        self.tap.arm()

    def compute_loss(self, state: State, next: Callable[[State], Tensor]) -> Tensor:
        x, targets, semantics = state.inputs, state.targets, self.tap.take()
        loss = next(state)
        warming = state.step < self.warmup * state.total_steps
        if not warming and self.frozen is None:
            self._freeze()

        positive = self._positives(targets if targets.ndim == 1 else targets.argmax(-1))
        rebuilt = self.wrapped(x, (semantics.detach() if warming else semantics)[positive])
        violation, distance = reconstruction_violation(x, rebuilt, 0.0 if warming else self.multiplier.margin)
        distance = self._mean_over_processes(state, distance.detach())
        self.error = torch.where(self.error.isinf(), distance, self.error.lerp(distance, 0.05))
        loss = loss + (violation if warming else self.multiplier.update(distance) * violation)
        if self.augments:
            perm = partners(len(x), x.device)
            with state.fabric.autocast():
                assert self.frozen is not None
                outputs = state.module(self.frozen(x, perm))
            loss = loss + self.augment_weight * state.criterion(outputs, targets[perm])
        return loss

    def on_step_end(self, state: State) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def on_epoch_end(self, state: State) -> None:
        state.logs |= {
            "ddg/distance": float(self.error),
            "ddg/multiplier": float(self.multiplier.value),
            "ddg/augments": float(self.augments),
        }

    def teardown(self, state: State) -> None:
        self.tap.close()

    def state_dict(self) -> dict[str, Any]:
        return {
            "generator": self.generator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "multiplier": self.multiplier.state_dict(),
            "error": self.error,
            "random": self.random.get_state(),
            "frozen": None if self.frozen is None else self.frozen.state_dict(),
            "augments": self.augments,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.generator.load_state_dict(state_dict["generator"])
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.multiplier.load_state_dict(state_dict["multiplier"])
        self.error = state_dict["error"].to(self.error.device)
        self.random.set_state(state_dict["random"])
        if state_dict["frozen"] is not None:
            self._freeze()
            assert self.frozen is not None
            self.frozen.load_state_dict(state_dict["frozen"])
        self.augments = state_dict["augments"]

    def _positives(self, labels: Tensor) -> Tensor:
        positive = torch.arange(len(labels), device=labels.device)
        paired = ((labels[:, None] == labels).sum(1) > 1).nonzero().squeeze(1)
        positive[paired] = same_class_positives(labels, self.random, rows=paired)
        return positive

    def _freeze(self) -> None:
        self.augments = self.augment_weight > 0 and float(self.error) < self.augment_below
        self.tap.close()  # a hook would be copied along
        self.frozen = _Swapper(copy.deepcopy(self.module), copy.deepcopy(self.generator), self.num_classes, self.head)
        self.tap.open()

    @staticmethod
    def _mean_over_processes(state: State, value: Tensor) -> Tensor:
        """Multipliers must not drift apart."""
        return value if state.fabric.world_size == 1 else state.fabric.all_reduce(value, reduce_op="mean")  # type: ignore[return-value]


class _Generator(nn.Module):
    """Rebuilds images from their own variation and given semantics; one module, so that DDP wraps both networks."""

    def __init__(self, code: int, semantics: int, shape: tuple[int, int, int], width: int) -> None:
        super().__init__()
        self.variation, self.decoder = VariationEncoder(code), SwapDecoder(code, semantics, shape, width)

    def forward(self, images: Tensor, semantics: Tensor) -> Tensor:
        return self.decoder(self.variation(images), semantics)


class _Swapper(nn.Module):
    """A classifier and a generator that no longer change, for making swaps."""

    def __init__(self, module: nn.Module, generator: _Generator, num_classes: int, head: str | None) -> None:
        super().__init__()
        self.module, self.generator = module, generator
        self.tap = _Tap(module, num_classes, head)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor, perm: Tensor) -> Tensor:
        self.tap.arm()
        self.module(images)
        return self.generator.decoder(*swap(self.generator.variation(images), self.tap.take(), perm))


class _Tap:
    """Holds what the linear layer at a model's end was fed in the first pass after ``arm``."""

    def __init__(self, module: nn.Module, num_classes: int, name: str | None) -> None:
        layers = {
            path: layer
            for path, layer in module.named_modules()
            if isinstance(layer, nn.Linear) and (path == name if name else layer.out_features == num_classes)
        }
        if not layers:
            wanted = f"called {name!r}" if name else f"with {num_classes} outputs"
            raise UserError(f"{type(module).__name__} has no linear layer {wanted}; name one with head=")
        self.layer = list(layers.values())[-1]
        self.features = self.layer.in_features
        self.armed = False
        self.held: Tensor | None = None
        self.open()

    def open(self) -> None:
        self._handle = self.layer.register_forward_pre_hook(self._hold)

    def close(self) -> None:
        self._handle.remove()

    def arm(self) -> None:
        self.armed, self.held = True, None

    def take(self) -> Tensor:
        if self.held is None:
            raise UserError("the model's forward pass did not go through its linear layer; name another with head=")
        held, self.held = self.held, None
        return held

    def _hold(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self.armed:
            self.armed, self.held = False, inputs[0]
