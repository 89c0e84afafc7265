"""Which training examples a loss is owed to (Koh & Liang 2017), exactly for the last layer or by LiSSA."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count, islice

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from paperworks.errors import UserError
from paperworks.nn import keeping_modes, removing
from paperworks.train import Batches

Influence = Float[Tensor, "test train"]
Weights = Mapping[str, Tensor]


def last_layer_influence(
    train_features: Float[Tensor, "train features"],
    train_probs: Float[Tensor, "train classes"],
    train_targets: Int[Tensor, " train"],
    test_features: Float[Tensor, "test features"],
    test_probs: Float[Tensor, "test classes"],
    test_targets: Int[Tensor, " test"],
    *,
    damping: float = 1e-3,
    tolerance: float = 1e-2,
    max_iterations: int = 1000,
) -> Influence:
    r"""Influence of training examples on test losses through the last layer alone: softmax regression on features.

    $$I(z) = -\nabla L(z_\text{test})^\top (H + \lambda)^{-1} \nabla L(z)$$

    **Negative is helpful**: more weight for $z$ lowers the test loss. Leaving one of $n$ examples out changes the
    test loss by about $-I(z)/n$. With $\phi$ the features and a 1 for the bias, and $p$ the probabilities,

    $$\nabla L = (p - e_y) \phi^\top, \qquad
      H = \frac1n \sum_i (\operatorname{diag} p_i - p_i p_i^\top) \otimes \phi_i \phi_i^\top,$$

    so that nothing is differentiated and $H$ is never formed. Conjugate gradients solve for all test examples at
    once, preconditioned by the Kronecker product of $H$'s two factors averaged apart; then one matrix product
    gives every pair.

    Args:
        train_features, test_features: What the last layer sees, as ``last_layer`` returns.
        train_probs, test_probs: Softmax probabilities.
        train_targets, test_targets: Class indices.
        damping: $\lambda > 0$, the L2 penalty that $H$ lacks; the default is the reference implementation's.
        tolerance: Largest residual, relative to the test gradient. At the default, ranks are those of the exact
            solution for all purposes.
        max_iterations: Of conjugate gradients.

    Returns:
        One row a test example, one column a training example.

    Raises:
        UserError: If sizes do not fit, ``damping`` is not positive, or the equations are not solved in
            ``max_iterations``.
    """
    _check(damping, (train_features, train_probs, train_targets), (test_features, test_probs, test_targets))
    phi, p = _with_bias(train_features), train_probs
    gradients = torch.einsum("tk,td->tkd", _residuals(test_probs, test_targets), _with_bias(test_features))
    tests, classes, width = gradients.shape

    step = max(1, 2**24 // (tests * classes))  # examples at a time, which bounds memory
    parts = list(zip(torch.split(phi, step), torch.split(p, step), strict=True))

    def project(some: Tensor, v: Tensor) -> Float[Tensor, "some tests classes"]:
        return (some @ v.reshape(-1, width).t()).view(len(some), tests, classes)

    def hessian(v: Tensor) -> Tensor:
        total = damping * v
        for some, probs in parts:
            u = project(some, v).mul_(probs[:, None])
            u -= u.sum(2, keepdim=True) * probs[:, None]
            total += (u.view(len(some), -1).t() @ some).view_as(v) / len(phi)
        return total

    solved = _conjugate_gradients(hessian, _kronecker(phi, p, damping), gradients, tolerance, max_iterations)
    rows = torch.split(_residuals(p, train_targets), step)
    found = [(project(some, solved) * row[:, None]).sum(2) for (some, _), row in zip(parts, rows, strict=True)]
    return -torch.cat(found).t()


def _kronecker(phi: Tensor, p: Tensor, damping: float) -> Callable[[Tensor], Tensor]:
    r"""Multiply by the inverse of $A \otimes B + \lambda$; sure examples, who shape $H$ little, weigh little in $B$."""
    unsure = (1 - p.square().sum(1)).clamp(min=1e-6)
    a, turn_a = torch.linalg.eigh(torch.diag(p.mean(0)) - p.t() @ p / len(p))
    b, turn_b = torch.linalg.eigh((phi * unsure[:, None]).t() @ phi / unsure.sum())
    scale = torch.outer(a, b).clamp(min=0) + damping
    return lambda v: turn_a @ ((turn_a.t() @ v @ turn_b) / scale) @ turn_b.t()


def _conjugate_gradients(
    operator: Callable[[Tensor], Tensor],
    precondition: Callable[[Tensor], Tensor],
    b: Float[Tensor, "test classes width"],
    tolerance: float,
    most: int,
) -> Float[Tensor, "test classes width"]:
    """Solve for each matrix of a batch apart."""

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum((1, 2), keepdim=True)

    x, residual = torch.zeros_like(b), b
    direction = z = precondition(b)
    fit, goal = dot(residual, z), tolerance * dot(b, b).sqrt()
    for _ in range(most):
        if bool((dot(residual, residual).sqrt() <= goal).all()):
            return x
        moved = operator(direction)
        step = fit / dot(direction, moved).clamp(min=torch.finfo(b.dtype).tiny)
        x, residual = x + step * direction, residual - step * moved
        z = precondition(residual)
        fit, before = dot(residual, z), fit
        direction = z + fit / before.clamp(min=torch.finfo(b.dtype).tiny) * direction
    raise UserError(f"influence is not solved to {tolerance:g} in {most} iterations: raise damping or max_iterations")


def _with_bias(features: Tensor) -> Tensor:
    return F.pad(features, (0, 1), value=1.0)


def _residuals(probs: Tensor, targets: Tensor) -> Tensor:
    return probs - F.one_hot(targets, probs.shape[1])


def _check(damping: float, *sides: tuple[Tensor, Tensor, Tensor]) -> None:
    if not damping > 0:
        raise UserError(f"damping must be positive, got {damping}")
    for name, (features, probs, targets) in zip(("train", "test"), sides, strict=True):
        if not len(features) == len(probs) == len(targets):
            raise UserError(
                f"{name} features, probs and targets must be equally many, "
                f"got {len(features)}, {len(probs)} and {len(targets)}"
            )
        if not (features.isfinite().all() and probs.isfinite().all()):
            raise UserError(f"{name} features and probs must be finite")


def last_layer(model: nn.Module, images: Float[Tensor, "batch channels height width"]) -> tuple[Tensor, Tensor]:
    """What the last linear layer sees of images, and the logits that it gives.

    Raises:
        UserError: If the model does not end in an ``nn.Linear`` on one vector an image.
    """
    seen: list[tuple[Tensor, Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    with removing(hooks), keeping_modes(model), torch.no_grad():
        logits = model.eval()(images)
    if not seen or seen[-1][1] is not logits or logits.ndim != 2:
        raise UserError("last-layer influence needs a model that ends in nn.Linear on one vector an image; use LiSSA")
    return seen[-1][0], logits


def lissa_influence(
    model: nn.Module,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    parameters: Sequence[str] | None = None,
    damping: float = 1e-3,
    scale: float = 5000.0,
    depth: int = 5000,
    repeats: int = 1,
    batch_size: int = 1,
    seed: int = 0,
) -> Influence:
    r"""Influence through any layers, with the inverse Hessian summed as a series (LiSSA).

    $$v_0 = g, \qquad v_{j+1} = g + (1 - \lambda) v_j - \tfrac1c H_{B_j} v_j, \qquad s \approx v_J / c$$

    with $g$ the gradient of the test loss and $H_{B_j}$ the Hessian of the cross entropy on a batch. The series
    converges if no eigenvalue of $H_B$ exceeds $c$, towards $(H + c \lambda)^{-1} g$: with the reference
    implementation's $\lambda$ = 0.001 and $c$ = 5000, the curvature is damped by 5. The sign is that of
    ``last_layer_influence``.

    Args:
        model: Images to logits; used in evaluation mode.
        train, test: Inputs and class indices.
        parameters: Names of those through which influence flows; all that require a gradient if not given.
        damping: $\lambda$.
        scale: $c$.
        depth: $J$. The reference's is 1 by default, which is no inverse at all, and 9000 in its example.
        repeats: Series that are averaged, over other orders of the training examples.
        batch_size: Examples in $B_j$.
        seed: Of these orders.

    Raises:
        UserError: If a setting is out of range, a parameter is unknown, or the series diverges.
    """
    if not (0 <= damping < 1 and scale > 0 and depth >= 1 and repeats >= 1 and batch_size >= 1):
        raise UserError(
            "lissa needs 0 <= damping < 1, scale > 0 and depth, repeats, batch_size of at least 1, "
            f"got {damping}, {scale}, {depth}, {repeats}, {batch_size}"
        )
    named = {name: p.detach() for name, p in model.named_parameters()}
    free = [name for name, p in model.named_parameters() if p.requires_grad]
    if missing := [name for name in parameters or () if name not in free]:
        raise UserError(f"the model has no trainable parameter {missing[0]!r}")
    chosen = {name: named[name] for name in parameters or free}

    def loss(weights: Weights, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, named | dict(weights), (x,)), y)

    def one(weights: Weights, x: Tensor, y: Tensor) -> Tensor:
        return loss(weights, x[None], y[None])

    with keeping_modes(model):
        model.eval()
        g = vmap(grad(one), (None, 0, 0))(chosen, *test)
        total = {name: torch.zeros_like(value) for name, value in g.items()}
        for repeat in range(repeats):
            v = g
            for batch in islice(_batches(len(train[0]), batch_size, seed + repeat), depth):
                slope = partial(grad(loss), x=train[0][batch], y=train[1][batch])
                curved = vmap(lambda v: jvp(slope, (chosen,), (v,))[1])(v)  # noqa: B023
                v = {k: g[k] + (1 - damping) * v[k] - curved[k] / scale for k in g}
            total = {k: total[k] + v[k] / (scale * repeats) for k in g}
        if not all(bool(value.isfinite().all()) for value in total.values()):
            raise UserError(f"LiSSA diverged: scale {scale:g} is below the largest curvature; raise it")

        # The directional derivative of a training loss along s is its gradient's product with s.
        def along(s: Weights, x: Tensor, y: Tensor) -> Tensor:
            return jvp(lambda weights: one(weights, x, y), (chosen,), (s,))[1]

        every = vmap(vmap(along, (None, 0, 0)), (0, None, None))
        parts = zip(torch.split(train[0], 64), torch.split(train[1], 64), strict=True)
        return -torch.cat([every(total, *part) for part in parts], 1)


def _batches(size: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Batches of indices without end, in another order each pass."""
    batches = Batches(size, min(batch_size, size), seed=seed, drop_last=True)
    for batches.epoch in count():
        yield from batches
