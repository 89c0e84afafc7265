"""What is attacked: a classifier over categorical features, and what may be changed."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from paperworks.errors import UserError, unknown

MARGINS = ("prob", "logit")
Scores = Callable[[np.ndarray], np.ndarray]
Rows = Int[Tensor, "batch features"] | Int[np.ndarray, "batch features"]
Labels = Int[Tensor, " batch"] | Int[np.ndarray, " batch"]
Mask = Bool[Tensor, "features values"] | Bool[np.ndarray, "features values"]
Masks = Bool[Tensor, "... features values"] | Bool[np.ndarray, "... features values"]


def as_array(values: object) -> np.ndarray:
    """A tensor on whatever device, or something like an array, as a NumPy array."""
    return np.asarray(values.cpu() if isinstance(values, Tensor) else values)


class CategoricalProblem:
    r"""A classifier over $n$ categorical features of up to $m$ values, with what an attack may change.

    The attack raises the margin by which a row $x$ is *mis*classified,

    $$g(x) = \max_{c \ne y} s_c(x) - s_y(x),$$

    and succeeds once $g(x) > 0$; towards a target class $t$, $g(x) = s_t(x) - \max_{c \ne t} s_c(x)$. The
    scores $s$ are the model's probabilities, so that $-1 \le g \le 1$, or its logits.

    Args:
        model: Maps one-hot rows ``[batch, n, m]`` to logits ``[batch, classes]``. In evaluation mode: dropout
            or batch norms in training mode are warned of.
        n_values: m, or the number of values of each feature, whose codes are 0 to that less one.
        allowed: Values that a feature may take; all by default. Attacks take another mask for each row.
        mutable: Features that may change; all by default.
        margin: ``"prob"``, or ``"logit"`` where saturated probabilities leave no gradient. Logits are not
            bounded, as the bandit's bonus assumes.
        targeted: The class t to reach; by default any but the true one.
        embedding: ``[m, d]``, for many values: the model then takes the rows ``embedding[x]`` of shape
            ``[batch, n, d]`` instead of one-hot rows, and $\partial g/\partial Z$ follows by the chain rule.
        chunk: Rows a forward pass.

    Attributes:
        queries: Rows that were scored so far.
        gradients: Rows whose gradient was taken so far.

    Raises:
        UserError: For an argument that is not as described.
    """

    def __init__(
        self,
        model: nn.Module | None,
        n_values: int | Sequence[int],
        allowed: Mask | None = None,
        *,
        mutable: Bool[Tensor, " features"] | Bool[np.ndarray, " features"] | Sequence[bool] | None = None,
        margin: str = "prob",
        targeted: int | None = None,
        embedding: Float[Tensor, "values width"] | None = None,
        chunk: int = 512,
    ) -> None:
        if margin not in MARGINS:
            raise unknown("margin", margin, MARGINS)
        if chunk < 1:
            raise UserError(f"chunk must be at least 1, got {chunk}")
        if targeted is not None and targeted < 0:
            raise UserError(f"targeted must be a class from 0, got {targeted}")
        counts = [n_values] if isinstance(n_values, int) else [int(count) for count in n_values]
        if not counts or min(counts) < 1 or max(counts) < 2:
            raise UserError(f"n_values must be at least 2 (1 for a feature that is constant), got {n_values}")
        self.model, self.margin_kind = model, margin
        self.scores: Scores | None = None
        self.m, self.targeted, self.chunk = max(counts), targeted, chunk
        self.queries = self.gradients = 0
        if embedding is not None and len(embedding) != self.m:
            raise UserError(f"embedding must have a row for each of {self.m} values, got {len(embedding)}")
        self.embedding = None if embedding is None else embedding.detach()
        self.n: int | None = None if isinstance(n_values, int) else len(counts)
        self.allowed = None if self.n is None else np.arange(self.m) < np.array(counts)[:, None]
        if allowed is not None:
            self.allowed = self._mask(allowed) & (True if self.allowed is None else self.allowed)
            self.n = len(self.allowed)
            if not (some := self.allowed.any(1)).all():
                raise UserError(f"allowed[{int(some.argmin())}] is empty: a feature needs a value")
        self.mutable = None if mutable is None else as_array(mutable).astype(bool)
        if self.mutable is not None and self.mutable.shape != (self.n or len(self.mutable),):
            raise UserError(f"mutable must say of each of {self.n} features whether it may change")

    @classmethod
    def from_scores(
        cls,
        scores: Scores,
        n_values: int | Sequence[int],
        allowed: Mask | None = None,
        *,
        mutable: Bool[Tensor, " features"] | Bool[np.ndarray, " features"] | Sequence[bool] | None = None,
        targeted: int | None = None,
        chunk: int = 512,
    ) -> "CategoricalProblem":
        """A classifier that gives its scores and no gradients, for instance scikit-learn's ``predict_proba``.

        Args:
            scores: Maps rows of codes, an integer array ``[batch, n]``, to scores ``[batch, classes]``. Column
                k belongs to label k. Probabilities keep the margin within [-1, 1].
            n_values, allowed, mutable, targeted, chunk: See the class.
        """
        problem = cls(None, n_values, allowed, mutable=mutable, targeted=targeted, chunk=chunk)
        problem.scores, problem.margin_kind = scores, "logit"
        return problem

    @property
    def differentiable(self) -> bool:
        """Whether there are gradients."""
        return self.model is not None

    def margin(self, x: Rows, y: Labels) -> Float64[np.ndarray, " batch"]:
        """g of each row with its true class; counts a query a row."""
        rows, labels = as_array(x), as_array(y)
        found = [self._margins(rows[i : i + self.chunk], labels[i : i + self.chunk]) for i in self._starts(rows)]
        self.queries += len(rows)
        return np.concatenate(found)

    def gradient(self, x: Rows, y: Labels) -> Float64[np.ndarray, "batch features values"]:
        r"""$\partial g/\partial Z$ at the one-hot rows $Z(x)$; counts a gradient a row.

        Raises:
            UserError: If there are scores only.
        """
        if self.model is None:
            raise UserError("this problem gives scores only and no gradients")
        rows, labels = as_array(x), as_array(y)
        found = [self._slopes(rows[i : i + self.chunk], labels[i : i + self.chunk]) for i in self._starts(rows)]
        self.gradients += len(rows)
        return np.concatenate(found)

    def check(self, x: np.ndarray, y: np.ndarray, allowed: Masks | None = None) -> np.ndarray:
        """Check rows before an attack; returns ``allowed`` for each, ``[batch, n, m]``.

        Raises:
            UserError: If a value is out of range or not allowed where it stands, or a mask of another shape.
        """
        batch, n = x.shape
        if self.n not in (None, n) or (self.mutable is not None and len(self.mutable) != n):
            raise UserError(f"x must have {self.n or len(self.mutable or ())} features, got {n}")
        if len(y) != batch:
            raise UserError(f"y must have a class for each of {batch} rows, got {len(y)}")
        if (bad := (x < 0) | (x >= self.m)).any():
            row, i = np.argwhere(bad)[0]
            raise UserError(f"x[{row}, {i}] is {x[row, i]}, expected a value from 0 to {self.m - 1}")
        if (y < 0).any():
            raise UserError(f"y[{int(y.argmin())}] is {y.min()}, expected a class from 0")
        masks = np.ones((1, n, self.m), dtype=bool) if self.allowed is None else self.allowed[None]
        if allowed is not None:
            mask = as_array(allowed)
            if mask.dtype != bool or mask.shape not in ((n, self.m), (batch, n, self.m)):
                raise UserError(f"allowed must be bool [{batch}, {n}, {self.m}], got {mask.dtype} {list(mask.shape)}")
            masks = masks & mask
        masks = np.broadcast_to(masks, (batch, n, self.m))
        stands = np.take_along_axis(masks, x[:, :, None], axis=2)[:, :, 0]
        if not stands.all():
            row, i = np.argwhere(~stands)[0]
            raise UserError(f"x[{row}, {i}] is {x[row, i]}, which is not allowed there: attack rows of allowed values")
        modules = () if self.model is None else self.model.modules()
        if any(module.training and isinstance(module, _DropoutNd | _NormBase) for module in modules):
            warnings.warn("the model is in training mode, with dropout or batch norms: call eval() first", stacklevel=3)
        return masks

    def _mask(self, allowed: Mask) -> np.ndarray:
        mask = as_array(allowed)
        if mask.dtype != bool or mask.ndim != 2 or mask.shape != (self.n or len(mask), self.m):
            expected = f"bool [{self.n or 'features'}, {self.m}]"
            raise UserError(f"allowed must be {expected}, got {mask.dtype} {list(mask.shape)}")
        return mask

    def _starts(self, rows: np.ndarray) -> range:
        return range(0, max(len(rows), 1), self.chunk)

    @torch.no_grad()
    def _margins(self, rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
        if self.model is None:
            assert self.scores is not None
            return self._difference(torch.as_tensor(np.asarray(self.scores(rows))), rows, labels).double().numpy()
        return self._difference(self.model(self._encode(rows)), rows, labels).double().cpu().numpy()

    def _slopes(self, rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
        assert self.model is not None
        # cuDNN has no backward pass of a recurrent layer in evaluation mode.
        recurrent = any(isinstance(module, nn.RNNBase) for module in self.model.modules())
        with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext():
            inputs = self._encode(rows).requires_grad_()
            total = self._difference(self.model(inputs), rows, labels).sum()
            (slopes,) = torch.autograd.grad(total, inputs)
        if self.embedding is not None:
            slopes = slopes @ self.embedding.to(slopes).t()
        return slopes.double().cpu().numpy()

    def _encode(self, rows: np.ndarray) -> Tensor:
        """What the model takes: one-hot rows, or their embeddings."""
        assert self.model is not None
        like = next((p for p in self.model.parameters() if p.is_floating_point()), torch.empty(0))
        codes = torch.as_tensor(rows, device=like.device, dtype=torch.int64)
        if self.embedding is not None:
            return F.embedding(codes, self.embedding.to(like))
        return F.one_hot(codes, self.m).to(like.dtype)

    def _difference(self, outputs: Tensor, rows: np.ndarray, labels: np.ndarray) -> Tensor:
        """The margins of scores ``[batch, classes]``."""
        if outputs.ndim != 2 or len(outputs) != len(rows) or outputs.shape[1] < 2:
            raise UserError(f"the model returned {list(outputs.shape)}, expected [{len(rows)}, classes] of 2 or more")
        classes = outputs.shape[1]
        if (labels >= classes).any():
            raise UserError(f"y holds class {labels.max()}, but the model has classes 0 to {classes - 1}")
        if self.targeted is not None and self.targeted >= classes:
            raise UserError(f"targeted is {self.targeted}, but the model has classes 0 to {classes - 1}")
        if not outputs.isfinite().all():
            raise UserError("the model returned NaN or infinity")
        scores = outputs.softmax(1) if self.margin_kind == "prob" else outputs
        own = torch.as_tensor(labels, device=scores.device, dtype=torch.int64)[:, None]
        if self.targeted is not None:
            own = torch.full_like(own, self.targeted)
        others = scores.scatter(1, own, -torch.inf).amax(1)
        margins = others - scores.gather(1, own)[:, 0]
        return margins if self.targeted is None else -margins
