"""IERN: emotion and context taken apart, and the emotion classified under every source's context."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer

from paperworks.data.labels import check_labels
from paperworks.errors import UserError
from paperworks.nn import keeping_modes
from paperworks.robust.iern.adjustment import (
    average_strata,
    check_average,
    check_prior,
    strata_logits,
    strata_spread,
)
from paperworks.robust.iern.bank import ConfounderBank
from paperworks.robust.iern.confusion import confusion_loss
from paperworks.robust.iern.networks import (
    Discriminator,
    Encoder,
    Feature,
    Head,
    Reconstructor,
    initialize,
)

Images = Float[Tensor, "batch colours rows columns"]
Logits = Float[Tensor, "batch classes"]


class Optimizers(NamedTuple):
    """One optimizer for each of the steps 2, 3 and 4. The emotion encoder is in the last two."""

    discriminators: Optimizer
    features: Optimizer
    classifier: Optimizer


class IERN(nn.Module):
    r"""Interventional Emotion Recognition Network (Chen et al., ACM Multimedia 2022).

    For training sets merged from several sources, in which class and source are confounded. A base gives
    feature maps $f$; encoders split them into emotion $e$ and context $c$; a reconstructor $R$ puts the
    halves together; each source has a context prototype $Z_m$. The prediction is averaged over all of them
    (see `backdoor_average`):

    $$o(x) = \sum_m P(m)\, H(R(e(x), Z_m))$$

    so that neither the source nor the context of $x$ is needed. One iteration of training (section 3.4):

    1. $f = \mathrm{Base}(x)$, $e = E(f)$, $c = G(f)$.
    2. The discriminators learn, each on its own half: $\tfrac12 [CE(D_E(e), y) + CE(D_C(c), d)]$.
    3. $E$, $G$, $R$ and $Z$ learn to confuse the *other* half's discriminator, to gather the contexts of a source and
       to reconstruct $f$: $\tfrac{w}{2} [\ell_{conf}(D_E(c)) + \ell_{conf}(D_C(e))] + L_Z + \mathrm{MSE}(R(e, c), f)$.
    4. Base, $E$ and $H$ learn to classify: $CE(o, y)$, with $e$ computed anew by the updated $E$ (the order that the
       reference implementation means, and PyTorch refuses since 1.5).

    Steps 2 and 3 see $f$ without its history, and step 4 leaves $R$ and $Z$ alone; outside step 3 (2) the
    parameters of $G$, $R$ and $Z$ (the discriminators) do not require gradients, so plain optimizers pass
    over them.

    Args:
        base: Maps images to ``[batch, channels, *feature_size]``; for instance `resnet_base`.
        num_classes: $K$.
        num_sources: $M$.
        channels: Channels of the base's maps.
        feature_size: Height and width of the maps, or both as one number.
        encoder_blocks: Residual blocks of $E$ and of $G$.
        reconstructor_blocks: Residual blocks of $R$.
        norm: Normalisation in $E$, $G$, $R$. ``"batch"`` is the reference implementation's; its running
            averages blend the true contexts with the prototypes, which costs accuracy in evaluation mode.
        prior: $P(m)$: ``"uniform"`` (the paper's), ``"empirical"`` (shares of the sources observed in
            training) or a vector.
        average: Average ``"logit"``s (the paper's) or probabilities (``"prob"``).
        confusion_weight: $w$. 0 is the ablation without adversaries: step 2 is left out.
        center_weight: $\lambda_z$ (see `ConfounderBank`).
        intervene: False is the ablation without intervention: $o = H(R(e, c))$.
        generator: Draws the initial weights of all networks but the base from $N(0, \sigma^2)$ with
            $\sigma = 0.02\sqrt{512/\mathrm{channels}}$: the reference's 0.02 at 512 channels, and the same
            gain at any other width.

    Raises:
        UserError: If an argument is out of range.

    Example:
        >>> model = IERN(resnet_base("resnet50", weights="DEFAULT"), num_classes=6, num_sources=3)
        >>> optimizers = model.optimizers()
        >>> for images, labels, sources in loader:
        ...     losses = model.training_step(images, labels, sources, optimizers)
        >>> model.predict(new_images).argmax(1)
    """

    prior_weights: Tensor | None

    def __init__(
        self,
        base: nn.Module,
        num_classes: int,
        num_sources: int,
        *,
        channels: int = 512,
        feature_size: int | tuple[int, int] = 7,
        encoder_blocks: int = 2,
        reconstructor_blocks: int = 3,
        norm: str = "group",
        prior: str | Float[Tensor, " _"] = "uniform",
        average: str = "logit",
        confusion_weight: float = 1.0,
        center_weight: float = 5e-4,
        intervene: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, number in {"num_classes": num_classes, "num_sources": num_sources}.items():
            if number < 2:
                raise UserError(f"{name} must be at least 2, got {number}")
        if not confusion_weight >= 0:
            raise UserError(f"confusion_weight must not be negative, got {confusion_weight}")
        check_average(average)
        size = (feature_size, feature_size) if isinstance(feature_size, int) else feature_size
        self.num_classes, self.num_sources, self.feature_shape = num_classes, num_sources, (channels, *size)
        self.average: str = average
        self.confusion_weight, self.intervene, self.norm = confusion_weight, intervene, norm
        self._set_prior(prior)

        self.base = base
        self.emotion_encoder = Encoder(channels, encoder_blocks, norm)
        self.context_encoder = Encoder(channels, encoder_blocks, norm)
        self.reconstructor = Reconstructor(channels, reconstructor_blocks, norm)
        self.emotion_discriminator = Discriminator(channels, num_classes, size)
        self.source_discriminator = Discriminator(channels, num_sources, size)
        self.head = Head(channels, num_classes)
        networks = [network for name, network in self.named_children() if name != "base"]
        for network in networks:
            initialize(network, 0.02 * math.sqrt(512 / channels), generator)
        self.bank = ConfounderBank(num_sources, self.feature_shape, weight=center_weight, generator=generator)
        for network in (*self._disentanglers, *self._discriminators):
            network.requires_grad_(False)

    @property
    def _disentanglers(self) -> tuple[nn.Module, ...]:
        """What learns in step 3 only."""
        return self.context_encoder, self.reconstructor, self.bank

    @property
    def _discriminators(self) -> tuple[nn.Module, ...]:
        """What learns in step 2."""
        return self.emotion_discriminator, self.source_discriminator

    def optimizers(
        self,
        lr: float = 2e-4,
        base_lr: float = 1e-4,
        feature_lr: float | None = None,
        *,
        betas: tuple[float, float] = (0.5, 0.999),
    ) -> Optimizers:
        """The three Adams of the reference implementation.

        Adam forgets the size of a loss, so whatever their weights, steps 3 and 4 pull at the emotion encoder as
        strongly as their rates say: reconstruction (which keeps the source) against classification.

        Args:
            lr: Rate of steps 2 and 4.
            base_lr: Rate of the base in step 4.
            feature_lr: Rate of step 3; that of the others by default, as in the reference implementation.
            betas: Adam's.
        """

        def parameters(*networks: nn.Module) -> list[nn.Parameter]:
            return [p for network in networks for p in network.parameters()]

        classifier: list[dict[str, Any]] = [
            {"params": parameters(self.emotion_encoder, self.head)},
            {"params": parameters(self.base), "lr": base_lr},
        ]
        return Optimizers(
            discriminators=Adam(parameters(*self._discriminators), lr, betas),
            features=Adam(
                parameters(self.emotion_encoder, *self._disentanglers), lr if feature_lr is None else feature_lr, betas
            ),
            classifier=Adam(classifier, lr, betas),
        )

    def training_step(
        self,
        images: Images,
        labels: Int[Tensor, " batch"],
        sources: Int[Tensor, " batch"],
        optimizers: Optimizers,
    ) -> dict[str, Float[Tensor, ""]]:
        """One iteration: steps 1 to 4, with the updates.

        Returns:
            The losses, detached: ``discriminators``, ``confusion``, ``center``, ``reconstruction`` and
            ``classification``.

        Raises:
            UserError: If a label or source is out of range, or features are not finite or of another shape
                than announced.
        """
        features = self.base(images)
        losses = self.disentangle(features, labels, sources, optimizers)
        loss = F.cross_entropy(self.adjust(features), labels)
        descend(optimizers.classifier, loss)
        return losses | {"classification": loss.detach()}

    def disentangle(
        self,
        features: Feature,
        labels: Int[Tensor, " batch"],
        sources: Int[Tensor, " batch"],
        optimizers: Optimizers,
        *,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> dict[str, Float[Tensor, ""]]:
        """Steps 2 and 3 on the features of the base; gradients that parameters already hold are kept.

        Args:
            features: What the base gave; no gradient flows back into it.
            labels: Classes.
            sources: Sources.
            optimizers: Those of `optimizers`; the classifier's is not used.
            reduce: Averages a gradient over processes.

        Returns:
            The losses, detached.
        """
        self._check_batch(features, labels, sources)
        features = features.detach()
        self.bank.observe(sources)
        losses: dict[str, Tensor] = {}
        with learning(*self._disentanglers):
            emotion, context = self.emotion_encoder(features), self.context_encoder(features)
            if self.confusion_weight:
                with learning(*self._discriminators):
                    told = F.cross_entropy(self.emotion_discriminator(emotion.detach()), labels)
                    told = told + F.cross_entropy(self.source_discriminator(context.detach()), sources)
                    losses["discriminators"] = told / 2
                    descend(optimizers.discriminators, losses["discriminators"], reduce)
                confused = confusion_loss(self.emotion_discriminator(context))
                confused = confused + confusion_loss(self.source_discriminator(emotion))
                losses["confusion"] = confused / 2
            losses["center"] = self.bank.center_loss(context, sources)
            losses["reconstruction"] = F.mse_loss(self.reconstructor(emotion, context), features)
            total = losses["center"] + losses["reconstruction"]
            if self.confusion_weight:
                total = total + self.confusion_weight * losses["confusion"]
            descend(optimizers.features, total, reduce)
        return {name: loss.detach() for name, loss in losses.items()}

    def adjust(self, features: Feature) -> Logits:
        """The adjusted logits of the base's features: what step 4 and every prediction compute."""
        emotion = self.emotion_encoder(features)
        if not self.intervene:
            return self.head(self.reconstructor(emotion, self.context_encoder(features)))
        prior = self.bank.prior() if self.prior == "empirical" else self.prior_weights
        return average_strata(self._under_each(emotion, self.bank.prototypes()), prior, self.average)

    def forward(self, images: Images) -> Logits:
        return self.adjust(self.base(images))

    @torch.no_grad()
    def predict(self, images: Images) -> Logits:
        """Logits (see ``average``) in evaluation mode; warns while some prototype has learnt from no example."""
        self._warn_if_unseen()
        with evaluating(self):
            return self(images)

    @torch.no_grad()
    def predict_under(self, images: Images, stratum: int) -> Logits:
        """Logits as if every image came from the source ``stratum``.

        Raises:
            UserError: If there is no such source.
        """
        if not 0 <= stratum < self.num_sources:
            raise UserError(f"stratum must be from 0 to {self.num_sources - 1}, got {stratum}")
        self._warn_if_unseen()
        with evaluating(self):
            emotion = self.emotion_encoder(self.base(images))
            return self._under_each(emotion, self.bank.prototypes()[stratum : stratum + 1])[0]

    @torch.no_grad()
    def spread(self, images: Images) -> Float[Tensor, " batch"]:
        """How much each prediction depends on the stratum: a diagnostic (see `strata_spread`)."""
        self._warn_if_unseen()
        with evaluating(self):
            emotion = self.emotion_encoder(self.base(images))
            return strata_spread(self._under_each(emotion, self.bank.prototypes()))

    @torch.no_grad()
    def encode(self, images: Images) -> tuple[Feature, Feature]:
        """The emotion and the context half, in evaluation mode: for probes of what each still tells."""
        with evaluating(self):
            features = self.base(images)
            return self.emotion_encoder(features), self.context_encoder(features)

    def _under_each(
        self, emotion: Feature, prototypes: Float[Tensor, "strata channels height width"]
    ) -> Float[Tensor, "strata batch classes"]:
        R = self.reconstructor
        # Batch statistics of all strata together would be others than the reference's, of one stratum at a time.
        one_pass = self.norm == "group" or not self.training
        return strata_logits(R.emotion(emotion), R.context(prototypes), R.merge, self.head, one_pass=one_pass)

    def _set_prior(self, prior: str | Tensor) -> None:
        if isinstance(prior, Tensor):
            check_prior(prior, self.num_sources)
            self.prior = "given"
            self.register_buffer("prior_weights", prior.detach().clone().float())
        elif prior in ("uniform", "empirical"):
            self.prior = prior
            self.prior_weights = None
        else:
            raise UserError(f"prior must be 'uniform', 'empirical' or a vector, got {prior!r}")

    def _check_batch(self, features: Tensor, labels: Tensor, sources: Tensor) -> None:
        check_labels(labels, self.num_classes, "labels")
        check_labels(sources, self.num_sources, "sources")
        if features.shape[1:] != self.feature_shape:
            got, announced = list(features.shape[1:]), list(self.feature_shape)
            raise UserError(f"base gave features {got}, but channels and feature_size announce {announced}")
        if not (finite := features.isfinite().flatten(1).all(1)).all():
            raise UserError(f"features of example {int(finite.int().argmin())} of the batch are not finite")

    def _warn_if_unseen(self) -> None:
        if len(unseen := (self.bank.seen == 0).nonzero()):
            names = ", ".join(str(int(m)) for m in unseen)
            warnings.warn(f"the prototype of source {names} is random: no training step saw it", stacklevel=3)


def descend(optimizer: Optimizer, loss: Tensor, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
    """One step down the gradient of ``loss``; gradients that the parameters already hold are kept."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    held = [p.grad for p in parameters]
    for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        p.grad = reduce(gradient) if reduce else gradient
    optimizer.step()
    for p, gradient in zip(parameters, held, strict=True):
        p.grad = gradient


@contextmanager
def learning(*networks: nn.Module) -> Iterator[None]:
    """Let the networks' parameters require gradients inside the block."""
    for network in networks:
        network.requires_grad_(True)
    try:
        yield
    finally:
        for network in networks:
            network.requires_grad_(False)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block."""
    with keeping_modes(module):
        module.eval()
        yield
