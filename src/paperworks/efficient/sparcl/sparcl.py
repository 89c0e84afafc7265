"""Weight and gradient masks as a change to anybody's training."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from paperworks.errors import UserError
from paperworks.train import Intervention, State

from .dgm import DynamicGradientMask
from .execution import SparseExecution
from .masks import Granularity, Include, SparsityMask, check_sparsity
from .replay import Replay
from .tdm import TaskAwareDynamicMask


class SparCL(Intervention):
    r"""Trains a sparse network with sparse gradients: ``TaskAwareDynamicMask`` and ``DynamicGradientMask`` together.

    Each ``fit`` of a trainer is one task; used again, the mask carries over to the next. Masks change at the first
    step of an epoch, when that step's gradients tell what is important. A training without replay, or of a single
    task, goes by the current task's gradient alone.

    The optimizer should be SGD without momentum and weight decay, as the paper's: either moves weights whose gradient
    is masked. It is warned about, and dead weights are set back to zero.

    Args:
        sparsity: Share $s$ of zeros in each masked layer. Default: the released script's, as below.
        gradient_sparsity: Share $q$ of their weights that get no gradient; 0 switches DGM off.
        include, granularity, scores: As for ``SparsityMask``.
        dynamic: Whether TDM changes the mask; without it, the first mask stays.
        p_inter, p_intra, period: As for ``TaskAwareDynamicMask``; ``p_inter`` is cut to $s$.
        refresh: As for ``DynamicGradientMask``. An epoch starts with a new gradient mask in any case.
        alpha, beta: Weights of the gradients in both importances.
        faithful_release: Importance as in the released code: $|w| + \tfrac12 |g|$ with the whole loss's gradient in
            the last step of the epoch before, as masked there, for weights, and the current $|g|$ for gradients.
        replay: The replay whose ``memory_loss`` is told apart from the current task's.
        batch_shape: Shape of a batch: run masked layers by a ``SparseExecution`` where that is faster, as measured
            before the first step. Without it, dead weights are multiplied like others.
        seed: Draws which weights are freed.

    Attributes:
        mask: The ``SparsityMask``, from the first ``setup`` on.
        execution: The ``SparseExecution``, if any; its ``table`` says which layers it pays for.
        refreshed: Whether this step drew up a new gradient mask, for which all live weights needed a gradient.

    Raises:
        UserError: If a share is out of range; in ``setup``, if the model cannot be masked or is another one.

    Example:
        >>> Trainer(epochs=50, interventions=[SparCL(sparsity=0.75)]).fit(model, data, loss=loss, optimizer=sgd)
    """

    mask: SparsityMask
    tdm: TaskAwareDynamicMask
    dgm: DynamicGradientMask

    def __init__(
        self,
        sparsity: float = 0.75,
        gradient_sparsity: float = 0.8,
        *,
        include: Include = "hidden",
        granularity: Granularity = "element",
        scores: Callable[[str, Tensor], Tensor] | None = None,
        dynamic: bool = True,
        p_inter: float = 0.01,
        p_intra: float = 0.01,
        period: int = 5,
        refresh: int = 30,
        alpha: float = 0.5,
        beta: float = 1.0,
        faithful_release: bool = False,
        replay: Replay | None = None,
        batch_shape: Sequence[int] | None = None,
        seed: int = 0,
    ) -> None:
        check_sparsity("sparsity", sparsity)
        check_sparsity("gradient_sparsity", gradient_sparsity)
        self.sparsity, self.gradient_sparsity = sparsity, gradient_sparsity
        self.include, self.granularity, self.scores = include, granularity, scores
        self.dynamic = dynamic and sparsity > 0
        self.p_inter, self.p_intra, self.period, self.refresh = p_inter, p_intra, period, refresh
        self.alpha, self.beta, self.faithful_release, self.replay = alpha, beta, faithful_release, replay
        self.batch_shape = batch_shape
        self.execution: SparseExecution | None = None
        self.generator = torch.Generator().manual_seed(seed)
        self.refreshed = self._epoch_begins = False
        self._memory: list[Tensor] | None = None
        self._last: list[Tensor] = []

    def setup(self, state: State) -> None:
        for group in state.optimizer.param_groups:
            for name in ("momentum", "weight_decay"):
                if group.get(name):
                    warnings.warn(
                        f"the optimizer's {name} of {group[name]} moves weights whose gradient is masked; "
                        "dead ones are set back to zero, but SparCL is meant for SGD without it",
                        stacklevel=2,
                    )
        if hasattr(self, "mask"):
            if self.mask.parameters[0] is not state.module.get_submodule(self.mask.names[0]).weight:
                raise UserError("this SparCL has masked another model: make a new one")
        else:
            self._mask(state)
        if self.dynamic:
            self.tdm.on_task_start(state.epochs)
        if self.execution is not None:
            self.execution.use(self._layers)
        elif self.batch_shape is not None:
            state.fabric.to_device(state.module)
            self.execution = SparseExecution(state.module, self.mask, self.batch_shape)

    def _mask(self, state: State) -> None:
        mask = SparsityMask(state.module, self.sparsity, self.include, granularity=self.granularity, scores=self.scores)
        if self.dynamic:
            self.tdm = TaskAwareDynamicMask(
                mask,
                p_inter=min(self.p_inter, self.sparsity),
                p_intra=self.p_intra,
                period=self.period,
                alpha=0.5 if self.faithful_release else self.alpha,
                beta=self.beta,
                generator=self.generator,
            )
        self.dgm = DynamicGradientMask(mask, self.gradient_sparsity, self.refresh, alpha=self.alpha, beta=self.beta)
        self.mask = mask

    def on_epoch_start(self, state: State) -> None:
        self._epoch_begins = True

    def compute_loss(self, state: State, next: Callable[[State], Tensor]) -> Tensor:
        loss, self._memory = next(state), None
        memory_loss = self.replay.memory_loss if self.replay else None
        if memory_loss is not None and self._looks and not self.faithful_release:
            parameters = self.mask.parameters
            gradients = torch.autograd.grad(memory_loss, parameters, retain_graph=True, materialize_grads=True)
            self._memory = [state.fabric.all_reduce(gradient) for gradient in gradients]  # type: ignore[misc]
        return loss

    @property
    def _looks(self) -> bool:
        """Whether this step's gradients decide about masks."""
        if self._epoch_begins and (self.dynamic or self.gradient_sparsity > 0):
            return True
        return self.gradient_sparsity > 0 and self.dgm.due

    @torch.no_grad()
    def on_gradients(self, state: State) -> None:
        current, memory = (self._gradients(), self._memory) if self._looks else (None, None)
        if self._epoch_begins:
            self._epoch_begins = False
            self.dgm.expire()
            if self.dynamic:
                judged = (self._last or None) if self.faithful_release else current
                self.tdm.on_epoch_start(state.epoch, judged, memory)
        if not self.gradient_sparsity:
            self.mask.apply_grads()
            return
        self.refreshed = self.dgm.due
        self.dgm.apply(None if self.faithful_release else current, memory)

    def _gradients(self) -> list[Tensor]:
        """Those of the current task's loss: of the whole one, less the memory's."""
        whole = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.mask.parameters]
        return whole if self._memory is None else list(torch._foreach_sub(whole, self._memory))

    def on_step_end(self, state: State) -> None:
        self.mask.apply_weights()
        if self.faithful_release:  # the optimizer forgets these tensors, which then stay as they are
            self._last = [p.grad for p in self.mask.parameters if p.grad is not None]

    def on_epoch_end(self, state: State) -> None:
        if self.dynamic and state.epoch + 1 == state.epochs:
            self.tdm.on_task_end()
        state.logs["sparcl/density"] = self.mask.overall_density()

    def teardown(self, state: State) -> None:
        if self.execution is not None:
            self._layers = self.execution.used
            self.execution.remove()

    def state_dict(self) -> dict[str, Any]:
        return {
            "mask": self.mask.state_dict(),
            "tdm": self.tdm.state_dict() if self.dynamic else {},
            "dgm": self.dgm.state_dict(),
            "epoch_begins": self._epoch_begins,
            "last": self._last,
            "sparse_layers": self.execution.used if self.execution else [],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.mask.load_state_dict(state_dict["mask"])
        if self.dynamic:
            self.tdm.load_state_dict(state_dict["tdm"])
        self.dgm.load_state_dict(state_dict["dgm"])
        if self.execution is not None:  # another measurement might choose others, whose sums round otherwise
            self.execution.use(state_dict["sparse_layers"])
        self._epoch_begins = state_dict["epoch_begins"]
        self._last = [
            gradient.to(weight) for gradient, weight in zip(state_dict["last"], self.mask.parameters, strict=False)
        ]
