"""CMPL, FixMatch and plain pseudo-labelling as an intervention in training."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from paperworks.errors import UserError
from paperworks.train import Intervention, State, Stream

from .augment import ClipAugment
from .loss import PseudoLabelStats, cross_pseudo_label_loss
from .module import check_range, join, part


class CMPL(Intervention):
    r"""Trains the model and an auxiliary network on each other's pseudo-labels of unlabelled clips.

    Every batch of labelled clips is joined by a batch of unlabelled ones in a weak and a strong view; each network
    sees them all in one forward pass. The loss is that of `CMPLModule`. The labelled part of *both* networks goes
    through the rest of the chain (``LogitClip`` clips both). Interventions that change the batch come before this one.

    The step can be given nothing but clips: a dataset that yields labels with them is refused.

    Recorded with each epoch, averaged over its steps: ``mask_rate`` (share of the clips with a pseudo-label) and
    ``confidence`` of the primary network, the same with the prefix ``auxiliary_``, and their ``agreement``.

    Args:
        auxiliary: The second network, trained by the same optimizer at the same learning rate and dropped afterwards.
            The paper's has a quarter of the primary's channels and is deeper. None is FixMatch; with
            ``ClipAugment(weak_transforms=(), strong_transforms=())`` it is plain pseudo-labelling.
        unlabelled: Clips ``[n, C, T, H, W]``, or a dataset that yields clips ``[C, T, H, W]`` alone.
        batch_size: Unlabelled clips a step, over all processes. The paper takes about five times the labelled ones.
        augment: Makes the views.
        threshold: Smallest confidence δ of a pseudo-label, in [0, 1].
        unlabelled_weight: λ. The paper's experiments are on far more data; 1 is safer for small ones.
        teacher: Whose labels a network learns from: the other's (``"next"``) or its own (``"self"``).
        seed: Decides the order of the unlabelled clips and the augmentation.

    Raises:
        UserError: If a number is out of range or ``unlabelled`` holds less than a batch.

    Example:
        >>> auxiliary = thin(partial(resnet3d, 50))(num_classes=101)
        >>> Trainer(epochs=40, interventions=[CMPL(auxiliary, unlabelled, batch_size=80)])
    """

    def __init__(
        self,
        auxiliary: nn.Module | None,
        unlabelled: Float[Tensor, "n channels frames height width"] | Dataset,
        *,
        batch_size: int,
        augment: ClipAugment | None = None,
        threshold: float = 0.8,
        unlabelled_weight: float = 2.0,
        teacher: Literal["next", "self"] = "next",
        seed: int = 0,
    ) -> None:
        check_range(threshold, unlabelled_weight)
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        if (size := len(unlabelled)) < batch_size:  # type: ignore[arg-type]
            raise UserError(f"unlabelled holds {size} clips, less than one batch of {batch_size}")
        self.auxiliary = auxiliary
        self.unlabelled = TensorDataset(unlabelled) if isinstance(unlabelled, Tensor) else unlabelled
        self.batch_size, self.seed = batch_size, seed
        self.augment = augment or ClipAugment()
        self.threshold, self.unlabelled_weight, self.teacher = threshold, unlabelled_weight, teacher
        self.names = ["", "auxiliary_"] if auxiliary is not None else [""]

    def setup(self, state: State) -> None:
        rank, world = state.fabric.global_rank, state.fabric.world_size
        self._stream = Stream(self.unlabelled, self.batch_size, seed=self.seed, rank=rank, world=world)
        self._generator = torch.Generator().manual_seed(self.seed * world + rank)
        self._sums, self._steps = torch.zeros(0), 0
        if self.auxiliary is not None:
            state.optimizer.add_param_group({"params": list(self.auxiliary.parameters())})
            self._second = state.fabric.setup_module(self.auxiliary.train())

    def on_batch(self, state: State) -> None:
        clips = _clips_alone(next(self._stream)).to(state.fabric.device)
        weak, strong = self.augment.weak(clips, self._generator), self.augment.strong(clips, self._generator)
        self._labelled = len(state.inputs)
        state.inputs = join(self.augment.weak(state.inputs, self._generator), weak, strong)

    def compute_loss(self, state: State, next: Callable[[State], Tensor]) -> Tensor:
        outputs = [state.outputs]
        if self.auxiliary is not None:
            outputs.append(self._second(state.inputs))
        on_labelled, on_weak, on_strong = zip(*(part(each, self._labelled) for each in outputs), strict=True)
        losses, stats = cross_pseudo_label_loss(on_weak, on_strong, self.threshold, self.teacher)
        self._record(stats)
        total = self.unlabelled_weight * losses.sum()
        for state.outputs in reversed(on_labelled):  # the primary network's outputs are what is left in the state
            total = total + next(state)
        return total

    def _record(self, stats: PseudoLabelStats) -> None:
        figures = torch.cat([stats.mask_rate, stats.confidence, stats.agreement[None]]).double()
        self._sums = figures if self._steps == 0 else self._sums.to(figures) + figures
        self._steps += 1

    def on_epoch_end(self, state: State) -> None:
        figures = self._sums / self._steps
        if state.fabric.world_size > 1:
            figures = state.fabric.all_reduce(figures, reduce_op="mean")  # type: ignore[assignment]
        labels = [f"{name}{figure}" for figure in ("mask_rate", "confidence") for name in self.names] + ["agreement"]
        state.logs.update(zip(labels, figures.tolist(), strict=True))
        self._steps = 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "auxiliary": {} if self.auxiliary is None else self.auxiliary.state_dict(),
            "stream": self._stream.state_dict(),
            "generator": self._generator.get_state(),
            "sums": self._sums,
            "steps": self._steps,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.auxiliary is not None:
            self.auxiliary.load_state_dict(state_dict["auxiliary"])
        self._stream.load_state_dict(state_dict["stream"])
        self._generator.set_state(state_dict["generator"])
        self._sums, self._steps = state_dict["sums"], state_dict["steps"]


def _clips_alone(batch: Any) -> Tensor:
    if isinstance(batch, list | tuple) and len(batch) == 1:
        (batch,) = batch
    if not isinstance(batch, Tensor):
        kind = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, list | tuple) else type(batch).__name__
        raise UserError(f"unlabelled must yield clips alone, [C, T, H, W], got a {kind}: leave labels out of it")
    return batch
