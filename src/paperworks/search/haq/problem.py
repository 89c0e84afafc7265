"""The problem that a search solves: how many bits for which layer of this model, on this device, within this budget."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from paperworks.errors import UserError, unknown
from paperworks.nn import keeping_modes

from .hardware import Hardware
from .kmeans import cluster_weights
from .layers import profile_layers
from .policy import (
    ENDS,
    MAX_BITS,
    MIN_BITS,
    Policy,
    check_policy,
    check_table,
    enforce_budget,
    fixed_policy,
    least_cost,
    policy_cost,
)
from .quantized import calibrate, quantize_model, restore_model

Quantizer = Literal["linear", "kmeans"]


class QuantizationProblem:
    r"""Bits for every layer of a model: what a policy scores, and what it costs on a simulated device.

    A policy is scored by quantizing the model, calling ``evaluate`` and putting the model back as it was, bit for bit,
    also when interrupted. Each policy is scored once; ``log`` keeps the scores, so that a search that was killed goes
    through what it had done in a moment when started again.

    Args:
        model: Trained, in floating point.
        evaluate: ``(model) -> accuracy`` in [0, 1] of the quantized model. It may train it first: the paper does so for
            an epoch, and the released code takes the accuracy of that very training. Better held-out data: hundreds
            of policies are compared on it, so report the winner on other data still.
        inputs: A batch for ``calibrate``.
        hardware: What layers cost, e.g. ``load_hardware("edge")``. If it tells costs by weight bits alone
            (``ModelSize``), activations are left as they are and policies are ``[layers, 1]``.
        budget: Largest cost, as a fraction of that of 8 bits everywhere.
        min_bits: Fewest bits of a layer.
        pinned: Layers that stay at 8 bits; by default the first and the last, as in the released code.
        quantizer: ``"linear"``, or ``"kmeans"`` to share weights (``cluster_weights``) where only they are quantized.
        log: File of scores, one JSON object a line; made if it is not there.
        seed: Of k-means.

    Attributes:
        layers: Their profiles, in the order of their use.
        table: Costs by layer and bits.
        target: Largest cost, in the table's unit.
        original: The score of the model as it is.
        scores: By policy, flattened to a tuple.

    Raises:
        UserError: If the budget is out of reach, the model has no layer to quantize, the table is of another model, a
            score is not finite, or ``log`` is of another model.

    Example:
        >>> problem = QuantizationProblem(model, evaluate, images, load_hardware("edge"), budget=0.5)
        >>> result = search(problem, episodes=600, seed=0)
    """

    def __init__(
        self,
        model: nn.Module,
        evaluate: Callable[[nn.Module], float],
        inputs: Tensor,
        hardware: Hardware,
        budget: float,
        *,
        min_bits: int = MIN_BITS,
        pinned: Sequence[int] = ENDS,
        quantizer: Quantizer = "linear",
        log: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        if not MIN_BITS <= min_bits <= MAX_BITS:
            raise UserError(f"min_bits must be from {MIN_BITS} to {MAX_BITS}, got {min_bits}")
        if not 0 < budget <= 1:
            raise UserError(f"budget must be a fraction in (0, 1] of the 8-bit cost, got {budget}")
        self.model, self.evaluate, self.seed = model, evaluate, seed
        self.min_bits, self.pinned, self.quantizer = min_bits, tuple(pinned), quantizer
        self.layers = profile_layers(model, inputs[:2])
        self.names = [layer.name for layer in self.layers]
        self.table = check_table(hardware.table(self.layers))
        if quantizer not in ("linear", "kmeans"):
            raise unknown("quantizer", quantizer, ("linear", "kmeans"))
        if quantizer == "kmeans" and self.table.ndim == 3:
            raise UserError("quantizer='kmeans' leaves activations alone: take hardware such as ModelSize")
        self.full_cost = policy_cost(self.table, fixed_policy(self.table, MAX_BITS))
        self.target = budget * self.full_cost
        least = least_cost(self.table, min_bits, self.pinned)
        if least > self.target:
            reach = f"with {min_bits} bits wherever they may be lowered it costs {least / self.full_cost:.4g}"
            raise UserError(f"budget={budget:g} of the 8-bit cost is out of reach: {reach}")
        self.ranges = calibrate(model, inputs, self.names)
        self._exact = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.scores: dict[tuple[int, ...], float] = {}
        self._log = _Log(Path(log), self._identity()) if log else None
        if self._log:
            self.scores |= self._log.scores
        with self._restoring():
            self.original = self._evaluate("the unquantized model")

    def cost(self, policy: ArrayLike) -> float:
        """What a policy costs, as a fraction of 8 bits everywhere."""
        return policy_cost(self.table, check_policy(policy, len(self.layers))) / self.full_cost

    def fit(self, policy: ArrayLike) -> Policy:
        """The policy with bits lowered until it meets the budget; see ``enforce_budget``."""
        checked = check_policy(policy, len(self.layers))
        return enforce_budget(checked, self.table, self.target, min_bits=self.min_bits, pinned=self.pinned)

    def score(self, policy: ArrayLike) -> float:
        """What ``evaluate`` says of the model quantized by a policy.

        Raises:
            UserError: If the policy is not one of this model, or the score not finite.
        """
        checked = self._check(policy)
        key = tuple(checked.ravel().tolist())
        if key not in self.scores:
            with self.quantized(checked):
                score = self._evaluate(f"policy {checked.tolist()}")
            if self._log:
                self._log.append(key, score)
            self.scores[key] = score
        return self.scores[key]

    def reward(self, score: float) -> float:
        r"""$R = 0.1 \, (\text{acc} - \text{acc}_\text{orig})$ in percent, the paper's reward (section 3)."""
        return 10 * (score - self.original)

    @contextmanager
    def quantized(self, policy: ArrayLike) -> Iterator[nn.Module]:
        """The model quantized by a policy inside the block, and as it was after it, whatever happened to it there."""
        checked = self._check(policy)
        with self._restoring():
            if self.quantizer == "kmeans":
                cluster_weights(self.model, dict(zip(self.names, checked[:, 0].tolist(), strict=True)), self.seed)
            else:
                quantize_model(self.model, checked, self.ranges)
            yield self.model

    @contextmanager
    def _restoring(self) -> Iterator[None]:
        with keeping_modes(self.model):
            try:
                yield
            finally:
                restore_model(self.model)
                self.model.load_state_dict(self._exact)

    def _check(self, policy: ArrayLike) -> Policy:
        checked = check_policy(policy, len(self.layers))
        if checked.shape[1] != self.table.ndim - 1:
            expected = "weight and activation bits" if self.table.ndim == 3 else "weight bits alone"
            raise UserError(f"policy must have {expected} for each layer, got {list(checked.shape)}")
        return checked

    def _evaluate(self, what: str) -> float:
        score = float(self.evaluate(self.model))
        if not math.isfinite(score):
            raise UserError(f"evaluate must return a finite number, got {score} for {what}")
        return score

    def _identity(self) -> dict[str, object]:
        digest = hashlib.sha256()
        for name, value in sorted(self._exact.items()):
            digest.update(name.encode())
            digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return {"model": digest.hexdigest()[:16], "layers": self.names, "quantizer": self.quantizer}


class _Log:
    """Scores by policy in a file: what they belong to, then one line each, so that a kill loses at most the last."""

    def __init__(self, path: Path, identity: dict[str, object]) -> None:
        self.path, self.scores = path, dict[tuple[int, ...], float]()
        header = json.dumps(identity)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(header + "\n", "utf-8")
            return
        whole, _, _ = path.read_text("utf-8").rpartition("\n")
        first, *lines = whole.split("\n")
        if first != header:
            raise UserError(f"{path} holds scores of another model or quantizer; name another file")
        for number, line in enumerate(lines, 2):
            try:
                record = json.loads(line)
                self.scores[tuple(record["policy"])] = float(record["score"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}, line {number} is damaged; delete it to score its policy again") from error
        os.truncate(path, len(f"{whole}\n".encode()))

    def append(self, policy: tuple[int, ...], score: float) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"policy": policy, "score": score}) + "\n")
