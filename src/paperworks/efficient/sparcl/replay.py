"""Replay: a memory of earlier tasks, and the losses of experience replay (ER) and dark experience replay (DER++)."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from paperworks.errors import UserError, unknown
from paperworks.train import Intervention, State

Method = Literal["er", "der++"]


def single_head_cross_entropy(
    logits: Float[Tensor, "batch classes"], targets: Int[Tensor, "batch"], classes: Sequence[int]
) -> Float[Tensor, ""]:
    r"""Cross entropy among the classes of one task: the logits of all others count as $-\infty$.

    $$\tilde L = -\frac{1}{n} \sum_i \log \frac{e^{z_{i, y_i}}}{\sum_{c \in C_t} e^{z_{i, c}}}$$

    Learning a task so leaves the other classes' logits without a gradient; only the memory compares them.

    Args:
        logits: Logits of all classes.
        targets: Class indices, each in ``classes``; another makes the loss infinite.
        classes: The current task's classes $C_t$.
    """
    others = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
    others[torch.as_tensor(classes, device=logits.device)] = False
    return F.cross_entropy(logits.masked_fill(others, -torch.inf), targets)


def er_loss(
    logits: Float[Tensor, "batch classes"], targets: Int[Tensor, "batch"], *, beta: float = 0.5
) -> Float[Tensor, ""]:
    r"""The memory's part of the ER loss: $b \cdot \mathrm{CE}(f(x_M), y_M)$ over the logits of all classes."""
    return beta * F.cross_entropy(logits, targets)


def der_pp_loss(
    logits: Float[Tensor, "batch classes"],
    remembered: Float[Tensor, "batch classes"],
    other_logits: Float[Tensor, "other classes"],
    other_targets: Int[Tensor, "other"],
    *,
    alpha: float = 0.1,
    beta: float = 0.5,
) -> Float[Tensor, ""]:
    r"""The memory's part of the DER++ loss, on two independent draws from the memory.

    $$a \cdot \mathrm{MSE}(f(x_M), z_M) + b \cdot \mathrm{CE}(f(x'_M), y'_M)$$

    Args:
        logits: $f(x_M)$ of the first draw.
        remembered: $z_M$, the logits of all classes when the first draw was stored.
        other_logits, other_targets: $f(x'_M)$ and $y'_M$ of the second draw.
        alpha, beta: $a$ and $b$. Defaults: the released script's.
    """
    return alpha * F.mse_loss(logits, remembered) + beta * F.cross_entropy(other_logits, other_targets)


class ReservoirBuffer:
    """Keeps a uniform sample of all examples ever added, each with probability ``size / seen``.

    Examples are tuples of tensors, e.g. (inputs, targets, logits), stored where the first ones lie.

    Args:
        size: Examples it holds.
        generator: Draws what is kept and what is drawn.

    Raises:
        UserError: If ``size`` is not positive.
    """

    def __init__(self, size: int, generator: torch.Generator) -> None:
        if size < 1:
            raise UserError(f"the buffer's size must be at least 1, got {size}: replay needs a memory")
        self.size, self.generator, self.seen = size, generator, 0
        self.fields: list[Tensor] = []

    def __len__(self) -> int:
        return min(self.seen, self.size)

    def add(self, *fields: Tensor) -> None:
        """Offer a batch, one tensor a field, the examples in their first dimension (algorithm R, all at once)."""
        n = len(fields[0])
        if not self.fields:
            self.fields = [field.detach().new_zeros((self.size, *field.shape[1:])) for field in fields]
        if len(fields) != len(self.fields) or any(len(field) != n for field in fields):
            lengths = [len(field) for field in fields]
            raise UserError(f"expected {len(self.fields)} fields of equal length, got lengths {lengths}")
        places = torch.arange(self.seen, self.seen + n)  # that of the i-th example ever, if it is among the first
        drawn = (torch.rand(n, generator=self.generator, dtype=torch.float64) * (places + 1)).long()
        slots = torch.where(places < self.size, places, drawn).tolist()
        # Of several for one slot, the last stays.
        kept = {slot: example for example, slot in enumerate(slots) if slot < self.size}
        self.seen += n
        if kept:
            device = self.fields[0].device
            to, of = (torch.tensor(list(index), device=device) for index in (kept, kept.values()))
            for store, field in zip(self.fields, fields, strict=True):
                store[to] = field.detach().to(device)[of].to(store.dtype)

    def draw(self, number: int) -> tuple[Tensor, ...]:
        """Up to ``number`` different examples, drawn at random: one tensor a field.

        Raises:
            UserError: If it is empty.
        """
        if not self.seen:
            raise UserError("the buffer is empty: add examples before drawing some")
        chosen = torch.randperm(len(self), generator=self.generator)[:number].to(self.fields[0].device)
        return tuple(field[chosen] for field in self.fields)

    def state_dict(self) -> dict[str, Any]:
        """Content, count and the state of the draws."""
        return {"fields": self.fields, "seen": self.seen, "generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any], device: torch.device | str = "cpu") -> None:
        """Restore what ``state_dict`` returned, onto ``device``."""
        self.fields = [field.to(device) for field in state_dict["fields"]]
        self.seen = state_dict["seen"]
        self.generator.set_state(state_dict["generator"])


class Replay(Intervention):
    """Adds the memory's loss to the current task's, and what was learnt from to the memory.

    The memory holds inputs as they come in, targets, and the raw logits of the step in which they were added.

    Args:
        buffer: The memory, kept from task to task.
        method: ``"der++"`` draws twice, for logits and for targets; ``"er"`` once, for targets.
        batch_size: Examples in a draw.
        alpha, beta: Weights of the two terms, as for ``der_pp_loss`` and ``er_loss``.
        transform: Augments a batch of inputs before the forward pass, current and drawn ones alike; the memory holds
            them as they were before. It draws from the global generators, which the trainer seeds.

    Attributes:
        rehearse: Whether the memory's loss is added; false in the first task.
        memory_loss: The memory's part of this step's loss, if any.
        drawn: Examples drawn in this step.

    Raises:
        UserError: If ``method`` is unknown or a number out of range.
    """

    def __init__(
        self,
        buffer: ReservoirBuffer,
        method: Method = "der++",
        *,
        batch_size: int = 32,
        alpha: float = 0.1,
        beta: float = 0.5,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if method not in get_args(Method):
            raise unknown("replay method", method, get_args(Method))
        if batch_size < 1 or alpha < 0 or beta < 0:
            raise UserError(
                f"batch_size must be positive, alpha and beta not negative: got {batch_size}, {alpha}, {beta}"
            )
        self.buffer, self.method, self.batch_size, self.alpha, self.beta = buffer, method, batch_size, alpha, beta
        self.transform = transform or (lambda inputs: inputs)
        self.rehearse, self.drawn = True, 0
        self.memory_loss: Tensor | None = None
        self._device: torch.device | str = "cpu"

    def setup(self, state: State) -> None:
        self._device = state.fabric.device

    def on_batch(self, state: State) -> None:
        self._inputs = state.inputs
        state.inputs = self.transform(state.inputs)
        self.memory_loss, self.drawn = None, 0

    def compute_loss(self, state: State, next: Callable[[State], Tensor]) -> Tensor:
        self._logits = state.outputs.detach()
        loss = next(state)
        if not (self.rehearse and len(self.buffer)):
            return loss
        inputs, targets, logits = self._draw()
        outputs = self._outputs(state, inputs)
        if self.method == "er":
            self.memory_loss = er_loss(outputs, targets, beta=self.beta)
        else:
            other_inputs, other_targets, _ = self._draw()
            others = self._outputs(state, other_inputs)
            self.memory_loss = der_pp_loss(outputs, logits, others, other_targets, alpha=self.alpha, beta=self.beta)
        return loss + self.memory_loss

    def _outputs(self, state: State, inputs: Tensor) -> Tensor:
        with state.fabric.autocast():
            outputs: Tensor = state.module(inputs)
        return outputs.to(self._logits.dtype)

    def _draw(self) -> tuple[Tensor, Tensor, Tensor]:
        inputs, targets, logits = self.buffer.draw(self.batch_size)
        self.drawn += len(inputs)
        return self.transform(inputs), targets, logits

    def on_step_end(self, state: State) -> None:
        self.buffer.add(self._inputs, state.targets, self._logits)

    def state_dict(self) -> dict[str, Any]:
        return self.buffer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.buffer.load_state_dict(state_dict, self._device)
