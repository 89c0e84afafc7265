"""DDG as a module with its two training stages."""

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import MultiStepLR

from paperworks.errors import UserError

from .constraint import partners, swap
from .discriminator import MultiScaleDiscriminator
from .dual import DualVariable
from .stages import stage0_terms, stage1_terms

Images = Float[Tensor, "_ ..."]
Labels = Int[Tensor, " _"]
Figures = dict[str, Tensor]

HALVES = 2  # losses add up the means of the two batches, as the reference's do


class DDG(nn.Module):
    r"""Disentanglement-constrained domain generalisation (Zhang et al., CVPR 2022).

    $$\min_\theta\ \mathbb E\,\ell(h(s(x)), y)\quad\text{subject to}\quad
      \mathbb E\,d\big(x, D(v(x), s(x'))\big) \le \gamma$$

    for $x'$ of the same class: what can be exchanged within a class without harm to the reconstruction is the class,
    and the rest, $v(x)$, is nuisance. No domain labels are needed. Training has two stages:

    - *stage 0* trains $v$ and $D$ to rebuild and swap, on the semantics of the backbone as it is;
    - *stage 1* trains everything on $\ell + \lambda\,(\text{violation}) + w\,(\text{augmented risk})$ and $\lambda$ by
      dual ascent (`DualVariable`). The augmented images are swaps by a frozen copy of stage 0's networks.

    What the constraint does not give: it does not remove the nuisance from $s$, as the decoder may ignore it there;
    and without a bottleneck in $v$ it is empty. Swaps of an under-trained stage 0 hurt; see ``augment_below``.

    Args:
        semantic: $s$: images to vectors (or whatever ``classifier`` and ``decoder`` take).
        classifier: $h$: semantics to logits.
        variation: $v$: images to codes.
        decoder: $D$: ``(v, s)`` to images.
        discriminator: Judge of the swaps in stage 0; ``None`` leaves the adversarial term out.
        multiplier: $\lambda$ and $\gamma$; the default has the reference's values for 28x28 images in [0, 1].
            ``DualVariable(init=w, lr=0)`` is a fixed penalty, and with ``init=0`` there is no constraint.
        p: Order of the distance: 1 is the paper's.
        augment_weight: $w$; 0 leaves augmentation out.
        augment_below: Augment only if stage 0 came to a mean reconstruction error below this; ``None`` always does.
        augment: Other augmentation in place of the swaps, drawn twice a step, e.g. AugMix (the paper's appendix). It
            needs no stage 0.
        consistency_weight: Weight of `jensen_shannon` between those draws.
        swap_label: Whose label a swap gets: the owner of its ``"semantic"`` or of its ``"variation"`` code. The
            reference does the latter at 224x224, where the variation is a map that carries the shape.
        lr: Adam's rate for $s$ and $h$ in stage 1: 1e-3 at 28x28, 2e-5 for a ResNet.
        generator_lr: Adam's rate for $v$, $D$ and the discriminator.
        stage0_steps: Planned length of stage 0. After 20 % of it the cycle term sets in, and the rates fall tenfold
            at 60 and 90 %. (The reference has a third fall at 105 %, which is never reached.)
        reconstruction_weight, adversarial_weight: Weights in stage 0.
        cycle_growth, cycle_max: By how much the weight of the cycle grows a step, and where it stops.
        seed: Of the coin in stage 0's cycle.

    Raises:
        UserError: If a weight, a rate or ``swap_label`` is out of range.

    Example:
        >>> ddg = DDG(SemanticEncoder(), nn.Linear(128, 10), VariationEncoder(64), SwapDecoder(64, 128, (1, 28, 28)),
        ...           discriminator=MultiScaleDiscriminator())
        >>> for a, b in pairs_of_batches:              # two independent batches of images
        ...     ddg.stage0_step(a, b)
        >>> ddg.begin_stage1()
        >>> for a, b in pairs_of_batches:              # of (images, labels, positives)
        ...     figures = ddg.stage1_step(a, b)
        >>> ddg.predict(images).argmax(1)
    """

    stage0_error: Tensor

    def __init__(
        self,
        semantic: nn.Module,
        classifier: nn.Module,
        variation: nn.Module,
        decoder: nn.Module,
        *,
        discriminator: MultiScaleDiscriminator | None = None,
        multiplier: DualVariable | None = None,
        p: float = 1.0,
        augment_weight: float = 0.5,
        augment_below: float | None = None,
        augment: Callable[[Tensor], Tensor] | None = None,
        consistency_weight: float = 12.0,
        swap_label: Literal["semantic", "variation"] = "semantic",
        lr: float = 1e-3,
        generator_lr: float = 1e-4,
        stage0_steps: int = 10_000,
        reconstruction_weight: float = 0.5,
        adversarial_weight: float = 1.0,
        cycle_growth: float = 5e-3,
        cycle_max: float = 2.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        not_negative = {
            "augment_weight": augment_weight,
            "consistency_weight": consistency_weight,
            "reconstruction_weight": reconstruction_weight,
            "adversarial_weight": adversarial_weight,
            "cycle_growth": cycle_growth,
            "cycle_max": cycle_max,
        }
        for name, value in not_negative.items():
            if not value >= 0:
                raise UserError(f"{name} must not be negative, got {value}")
        for name, value in {"lr": lr, "generator_lr": generator_lr, "stage0_steps": stage0_steps}.items():
            if not value > 0:
                raise UserError(f"{name} must be positive, got {value}")
        if swap_label not in ("semantic", "variation"):
            raise UserError(f"swap_label must be 'semantic' or 'variation', got {swap_label!r}")
        self.semantic, self.classifier, self.variation, self.decoder = semantic, classifier, variation, decoder
        self.discriminator = discriminator
        self.multiplier = multiplier or DualVariable()
        self.p, self.swap_label = p, swap_label
        self.augment_weight, self.augment_below = augment_weight, augment_below
        self.augment, self.consistency_weight = augment, consistency_weight
        self.lr, self.generator_lr, self.stage0_steps = lr, generator_lr, stage0_steps
        self.reconstruction_weight, self.adversarial_weight = reconstruction_weight, adversarial_weight
        self.cycle_growth, self.cycle_max = cycle_growth, cycle_max
        self.register_buffer("stage0_error", torch.tensor(torch.inf))  # running mean of the reconstruction error
        self.frozen: nn.ModuleDict | None = None  # stage 0's networks, which make the swaps of stage 1
        self.steps = {"stage0": 0, "stage1": 0}
        self._coin = torch.Generator().manual_seed(seed)
        self._augments: bool | None = None
        self._optimizers: dict[str, Optimizer] = {}
        self._schedules: list[MultiStepLR] = []
        self._make_stage0_optimizers()

    # Use

    def forward(self, images: Images) -> Tensor:
        """Logits."""
        return self.classifier(self.semantic(images))

    def predict(self, images: Images) -> Tensor:
        r"""Logits $h(s(x))$; the generator takes no part."""
        return self(images)

    @torch.no_grad()
    def manipulate(self, content: Images, style: Images) -> Images:
        r"""$D(v(\text{style}), s(\text{content}))$: the class of one set of images in the variation of another."""
        return self.decoder(self.variation(style), self.semantic(content))

    # Stage 0

    def stage0_step(self, batch_a: Images, batch_b: Images) -> Figures:
        """One step of discriminator and generator on two independent batches of equal length.

        Returns:
            ``loss``, ``adversarial``, ``reconstruction``, ``cycle``, ``discriminator``: detached scalars.
        """
        if self.steps["stage1"] or self.frozen is not None:
            raise UserError("stage 0 is over: begin_stage1() has been called")
        x = _join(batch_a, batch_b)
        self.steps["stage0"] += 1
        late = self.steps["stage0"] - int(0.2 * self.stage0_steps)
        cycle_weight = min(max(late, 0) * self.cycle_growth, self.cycle_max)
        heads = bool(torch.rand((), generator=self._coin) < 0.5)

        terms = stage0_terms(
            self.semantic,
            self.variation,
            self.decoder,
            x,
            partners(len(x), x.device),
            cycle=cycle_weight > 0,
            train_encoder=heads,
        )
        loss = self.reconstruction_weight * terms.reconstruction + cycle_weight * terms.cycle
        adversarial = judged = x.new_zeros(())
        if self.discriminator is not None:
            judged = HALVES * self.adversarial_weight * self.discriminator.discriminator_loss(x, terms.swaps)
            self._descend(judged, "discriminator")
            adversarial = self.discriminator.generator_loss(terms.swaps)
            loss = loss + self.adversarial_weight * adversarial
        loss = HALVES * loss
        self._descend(loss, "generator")
        for schedule in self._schedules:
            schedule.step()
        error = terms.reconstruction.detach()
        self.stage0_error.copy_(torch.where(self.stage0_error.isinf(), error, self.stage0_error.lerp(error, 0.02)))
        figures = {
            "loss": loss,
            "reconstruction": error,
            "cycle": terms.cycle,
            "adversarial": adversarial,
            "discriminator": judged,
        }
        return {name: value.detach() for name, value in figures.items()}

    # Stage 1

    def begin_stage1(self) -> None:
        """Freeze a copy of stage 0's networks for making swaps, and start fresh optimizers.

        Raises:
            UserError: If the generator has not been through stage 0.
        """
        if self.frozen is not None:
            raise UserError("stage 1 has begun already")
        if self.augment is None and not self.steps["stage0"]:
            raise UserError(
                "stage 1 needs a trained generator: run stage0_step first, or load the state of a DDG that has"
            )
        self._freeze()

    def stage1_step(self, batch_a: tuple[Images, Labels, Images], batch_b: tuple[Images, Labels, Images]) -> Figures:
        r"""One dual step and one primal step on two independent batches of equal length.

        The dual step uses the mean distance of both batches (the reference: of the first) and comes first.

        Args:
            batch_a: Images, labels and positives: for each image another of its class (`same_class_positives`).
            batch_b: The same.

        Returns:
            ``loss``, ``risk``, ``positive_risk``, ``violation``, ``distance``, ``augmented_risk``, ``consistency`` and
            ``multiplier``: detached scalars.

        Raises:
            UserError: If `begin_stage1` has not been called or the shapes disagree.
        """
        if self.frozen is None:
            raise UserError("stage 1 needs the frozen generator of stage 0: call begin_stage1() after stage 0")
        x, labels, positives = (_join(a, b) for a, b in zip(batch_a, batch_b, strict=True))
        if positives.shape != x.shape or len(labels) != len(x):
            shapes = ", ".join(str(tuple(t.shape)) for t in (x, labels, positives))
            raise UserError(f"images, labels and positives must belong together, got shapes {shapes}")
        augmented, augmented_labels = self._augmented(x, labels)
        terms = stage1_terms(
            self.semantic,
            self.classifier,
            self.variation,
            self.decoder,
            x,
            labels,
            positives,
            augmented,
            augmented_labels,
            margin=self.multiplier.margin,
            p=self.p,
        )
        distance = terms.distance.detach()
        if not self.steps["stage1"] and float(distance) > 1:
            warnings.warn(
                f"the reconstruction distance is {float(distance):.3g}: the margin {self.multiplier.margin} "
                "is meant for pixels in [0, 1]",
                stacklevel=2,
            )
        self.steps["stage1"] += 1
        multiplier = self.multiplier.update(distance)
        loss = HALVES * (
            terms.risk
            + terms.positive_risk
            + multiplier * terms.violation
            + self.augment_weight * terms.augmented_risk
            + self.consistency_weight * terms.consistency
        )
        self._descend(loss, "classifier", "generator")
        figures = {**terms._asdict(), "loss": loss, "multiplier": multiplier}
        return {name: value.detach() for name, value in figures.items()}

    def _augmented(self, x: Tensor, labels: Tensor) -> tuple[list[Tensor], Tensor]:
        if self.augment_weight == 0 and self.augment is None:
            return [], labels
        if self.augment is not None:
            with torch.no_grad():
                return [self.augment(x), self.augment(x)], labels
        if self._augments is None:
            self._augments = self.augment_below is None or float(self.stage0_error) < self.augment_below
            if not self._augments:
                warnings.warn(
                    f"no augmentation: stage 0 ended with a reconstruction error of {float(self.stage0_error):.3g}, "
                    f"not below {self.augment_below}",
                    stacklevel=3,
                )
        if not self._augments:
            return [], labels
        assert self.frozen is not None
        perm = partners(len(x), x.device)
        with torch.no_grad():
            codes = swap(self.frozen["variation"](x), self.frozen["semantic"](x), perm)
            return [self.frozen["decoder"](*codes)], labels[perm] if self.swap_label == "semantic" else labels

    # Optimizers, and what a checkpoint holds

    def _make_stage0_optimizers(self) -> None:
        self._optimizers = {"generator": self._generator_optimizer()}
        if self.discriminator is not None:
            self._optimizers["discriminator"] = Adam(self.discriminator.parameters(), lr=self.generator_lr, fused=True)
        falls = [int(share * self.stage0_steps) for share in (0.6, 0.9)]
        self._schedules = [MultiStepLR(optimizer, falls) for optimizer in self._optimizers.values()]

    def _generator_optimizer(self) -> Optimizer:
        parameters = [*self.variation.parameters(), *self.decoder.parameters()]
        return Adam(parameters, lr=self.generator_lr, betas=(0.0, 0.999), weight_decay=5e-4, fused=True)

    def _freeze(self) -> None:
        networks = {"semantic": self.semantic, "variation": self.variation, "decoder": self.decoder}
        self.frozen = nn.ModuleDict(copy.deepcopy(networks)).requires_grad_(False).eval()
        trained = [p for p in (*self.semantic.parameters(), *self.classifier.parameters()) if p.requires_grad]
        self._optimizers = {
            "classifier": Adam(trained, lr=self.lr, fused=True),
            "generator": self._generator_optimizer(),
        }
        self._schedules = []

    def _descend(self, loss: Tensor, *names: str) -> None:
        """Step the named optimizers; no gradient outlives the step, so that players leave none to one another."""
        torch.autograd.backward(loss)
        for name in names:
            self._optimizers[name].step()
        self.zero_grad()

    def train(self, mode: bool = True) -> "DDG":
        """As of any module, but that the frozen copy stays in evaluation mode."""
        super().train(mode)
        if self.frozen is not None:
            self.frozen.eval()
        return self

    def get_extra_state(self) -> dict[str, Any]:
        """Optimizers, schedules, steps and the coin, so that ``state_dict`` is all that a resumed run needs."""
        return {
            "steps": dict(self.steps),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self._optimizers.items()},
            "schedules": [schedule.state_dict() for schedule in self._schedules],
            "coin": self._coin.get_state(),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what `get_extra_state` returned."""
        self.steps = dict(state["steps"])
        for name, content in state["optimizers"].items():
            self._optimizers[name].load_state_dict(content)
        for schedule, content in zip(self._schedules, state["schedules"], strict=True):
            schedule.load_state_dict(content)
        self._coin.set_state(state["coin"])

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of any module; a state from stage 1 puts the module into stage 1."""
        if self.frozen is None and any(name.startswith("frozen.") for name in state_dict):
            self._freeze()
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


def _join(a: Tensor, b: Tensor) -> Tensor:
    if a.shape != b.shape:
        raise UserError(f"the two batches must have equal shapes, got {tuple(a.shape)} and {tuple(b.shape)}")
    return torch.cat([a, b])
