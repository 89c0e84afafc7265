"""IERN in the trainer, and the paper's training recipe."""

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from paperworks.errors import UserError
from paperworks.robust.groups import sources_of
from paperworks.robust.iern.model import IERN, Optimizers
from paperworks.train import Intervention, State


class Disentangle(Intervention):
    """Steps 2 and 3 of `IERN` inside the trainer; the trainer's own forward pass, loss and optimizer are step 4.

    The steps run between the base and the rest of the forward pass, so that the base is computed once.
    Examples must come as ``(image, label, source)``. Learning rates follow the trainer's scheduler. Over
    several processes the gradients are averaged.

    Args:
        optimizers: Those of ``IERN.optimizers``; the trainer gets ``optimizers.classifier``.

    Raises:
        UserError: If the model is no `IERN`, or examples come without a source.

    Example:
        >>> optimizers = model.optimizers()
        >>> trainer = Trainer(epochs=160, interventions=[Disentangle(optimizers)])
        >>> trainer.fit(model, data.dataset(), loss=nn.CrossEntropyLoss(), optimizer=optimizers.classifier)
    """

    def __init__(self, optimizers: Optimizers) -> None:
        self.optimizers = optimizers
        self._own = (optimizers.discriminators, optimizers.features)
        self._rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self._own]
        self._pending = False
        self._losses: dict[str, Tensor] = {}
        self._hook: RemovableHandle | None = None

    def setup(self, state: State) -> None:
        model = state.module
        if not isinstance(model, IERN):
            raise UserError(f"Disentangle trains an IERN, got a {type(model).__name__}")
        reduce: Any = partial(state.fabric.all_reduce, reduce_op="mean")

        def disentangle(base: nn.Module, images: Any, features: Tensor) -> None:
            if not self._pending:  # evaluation, or somebody else's extra pass
                return
            self._pending = False
            sources = sources_of(state, model.num_sources)
            self._losses = model.disentangle(features, state.targets, sources, self.optimizers, reduce=reduce)

        self._hook = model.base.register_forward_hook(disentangle)

    def on_batch(self, state: State) -> None:
        self._pending = True
        group = state.optimizer.param_groups[0]
        scale = group["lr"] / group.get("initial_lr", group["lr"])
        for optimizer, rates in zip(self._own, self._rates, strict=True):
            for own, rate in zip(optimizer.param_groups, rates, strict=True):
                own["lr"] = rate * scale

    def on_epoch_end(self, state: State) -> None:
        state.logs |= {f"iern/{name}": float(loss) for name, loss in self._losses.items()}

    def teardown(self, state: State) -> None:
        if self._hook is not None:
            self._hook.remove()

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self._own]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer, content in zip(self._own, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(content)


def rate_factor(epoch: int, warmup: int = 5, constant: int = 15, decay: int = 140) -> float:
    """The paper's learning rate in ``epoch`` (from 0) as a factor, e.g. for ``LambdaLR``: up, constant, down to 0.

    For a trainer with ``schedule="epoch"``.
    """
    if epoch < warmup:
        return (epoch + 1) / (warmup + 1)
    return min(1.0, max(0.0, 1 - (epoch - warmup - constant) / decay))


def augmentation(size: int = 224) -> Any:
    """The paper's augmentation of images of ``size * 8 / 7`` pixels a side in [0, 1], and scaling to [-1, 1].

    Random crop, flip, blur (half of the images, σ 0.1 to 1.5), brightness 0.8 to 1.2, contrast 0.75 to 1.5,
    and an affine map (10°, a fifth of the side, scale 0.8 to 1.2, shear 8°).
    """
    from torchvision.transforms import v2

    return v2.Compose(
        [
            v2.RandomCrop(size),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.GaussianBlur(7, (0.1, 1.5))]),
            v2.ColorJitter(brightness=(0.8, 1.2), contrast=(0.75, 1.5)),
            v2.RandomAffine(10, translate=(0.2, 0.2), scale=(0.8, 1.2), shear=8),
            v2.Normalize([0.5], [0.5]),
        ]
    )
