"""Gradients of each class's loss, and how far two sets of them are apart."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.grad import conv2d_weight

from paperworks.errors import UserError, unknown
from paperworks.nn import removing

Distance = Literal["rows", "cos", "mse"]
EPS = 1e-6  # the reference implementation's, in the denominators

ClassImages = Float[Tensor, "classes batch channels height width"]


def gradient_distance(gs: Sequence[Tensor], gr: Sequence[Tensor], kind: Distance = "rows") -> Float[Tensor, ""]:
    r"""How far the gradients of synthetic and of real images point apart (Zhao et al. 2021).

    $$\text{rows:} \quad \sum_\ell \sum_i 1 - \frac{g^s_{\ell i} \cdot g^r_{\ell i}}
      {\lVert g^s_{\ell i} \rVert \lVert g^r_{\ell i} \rVert + \varepsilon}$$

    with a row $i$ for each output of layer $\ell$, $\varepsilon = 10^{-6}$. ``cos`` is the same of all numbers in one
    row, ``mse`` the squared distance of these. Parameters of one dimension (biases, norms) do not count.

    Args:
        gs: Gradients of synthetic images, one tensor a parameter.
        gr: Those of real ones, of the same shapes.
        kind: One of the three.

    Raises:
        UserError: If the shapes differ, or ``kind`` is unknown.
    """
    check_distance(kind)
    if [g.shape for g in gs] != [g.shape for g in gr]:
        raise UserError(f"gs and gr must have the same shapes, got {_shapes(gs)} and {_shapes(gr)}")
    return _distance([g for g in gs if g.ndim > 1], [g for g in gr if g.ndim > 1], kind)


def class_distance(gs: Sequence[Tensor], gr: Sequence[Tensor], kind: Distance) -> Float[Tensor, ""]:
    """The sum of ``gradient_distance`` over classes, which the first dimension of each tensor counts."""
    if kind == "rows":  # as many rows more
        return _distance([g.flatten(0, 1) for g in gs], [g.flatten(0, 1) for g in gr], kind)
    distances = [_distance(s, r, kind) for s, r in zip(zip(*gs, strict=True), zip(*gr, strict=True), strict=True)]
    return torch.stack(distances).sum()


def class_gradients(
    net: nn.Module,
    images: ClassImages,
    classes: Int[Tensor, "classes"],
    *,
    weights: Float[Tensor, "classes batch"] | None = None,
    create_graph: bool = False,
) -> list[Tensor]:
    r"""Gradients of the mean cross entropy of each class, for all weights of linear layers and convolutions.

    One pass forward and one back serve all classes: with $a$ what layer $\ell$ is given and $\delta$ the gradient of
    what it returns,

    $$\nabla_{W_\ell} L_c = \sum_{n \in c} \delta_n \star a_n,$$

    a product (linear) or correlation (convolution) of what belongs to class $c$; all classes at once make it a
    batched product, or a grouped convolution. Many classes of a few small images, of which the loop over classes
    mostly waits for the next operation, gain most. Where the images fill the machine, classes go through in parts, in
    the end one by one, so that memory stays bounded.

    Args:
        net: Layers must treat each image by itself, so there can be no batch norm.
        images: As many of each class.
        classes: The class of each row of images.
        weights: Of each image in its class's loss, or nothing for the mean.
        create_graph: Whether the gradients can be differentiated again.

    Returns:
        One tensor a layer, in the order of the forward pass: the shape of its weight after a dimension for classes.

    Raises:
        UserError: If a layer mixes images, or is one whose gradient is not known here.
    """
    C, B = images.shape[:2]
    if weights is None:
        weights = images.new_full((C, B), 1 / B)
    at_once = 2**16 if images.device.type == "cpu" else 2**22  # pixels
    part = max(1, at_once // images[0, :, 0].numel())
    parts = zip(*(torch.split(x, part) for x in (images, classes, weights)), strict=True)
    found = [_gradients(net, some, of, weigh, create_graph) for some, of, weigh in parts]
    return found[0] if len(found) == 1 else [torch.cat(layer) for layer in zip(*found, strict=True)]


def check_network(net: nn.Module) -> None:
    """Raises ``UserError`` for a network that ``class_gradients`` cannot treat."""
    for name, module in net.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise UserError(f"layer {name!r} is a batch norm, which mixes classes: use group or instance norm")
        if isinstance(module, nn.Conv2d):
            if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
                raise UserError(f"layer {name!r} must be a convolution with groups=1 and padding by a number of zeros")
        elif not isinstance(module, nn.Linear) and any(p.ndim > 1 for p in module.parameters(recurse=False)):
            raise UserError(f"layer {name!r} is a {type(module).__name__}: only Linear and Conv2d are known here")


def check_distance(kind: str) -> None:
    """Raises ``UserError`` for an unknown distance."""
    if kind not in get_args(Distance):
        raise unknown("distance", kind, get_args(Distance))


def _distance(gs: Sequence[Tensor], gr: Sequence[Tensor], kind: Distance) -> Tensor:
    if kind == "rows":
        return torch.stack([_one_minus_cos(s.flatten(1), r.flatten(1)) for s, r in zip(gs, gr, strict=True)]).sum()
    s, r = (torch.cat([g.flatten() for g in side]) for side in (gs, gr))
    return (s - r).square().sum() if kind == "mse" else _one_minus_cos(s[None], r[None])


def _one_minus_cos(s: Float[Tensor, "rows width"], r: Float[Tensor, "rows width"]) -> Tensor:
    return (1 - (s * r).sum(1) / (s.norm(dim=1) * r.norm(dim=1) + EPS)).sum()


def _gradients(net: nn.Module, images: Tensor, classes: Tensor, weights: Tensor, create_graph: bool) -> list[Tensor]:
    C, B = images.shape[:2]
    with _traced(net) as traced:
        logits = net(images.flatten(0, 1))
    loss = (F.cross_entropy(logits, classes.repeat_interleave(B), reduction="none") * weights.flatten()).sum()
    deltas = torch.autograd.grad(loss, [edge for _, _, edge in traced], create_graph=create_graph)
    gradients = []
    for (module, seen, _), delta in zip(traced, deltas, strict=True):
        seen, delta = (x.view(C, B, *x.shape[1:]) for x in (seen, delta))
        if isinstance(module, nn.Conv2d):
            gradients.append(_conv_gradient(module, seen, delta))
        else:
            gradients.append(delta.flatten(1, -2).transpose(1, 2) @ seen.flatten(1, -2))
    return gradients


def _conv_gradient(layer: nn.Conv2d, seen: Tensor, delta: Tensor) -> Tensor:
    """Classes as groups of channels: the weight gradient of a grouped convolution keeps them apart."""
    C, weight = len(seen), layer.weight
    grouped: Tensor = conv2d_weight(  # type: ignore[no-untyped-call]
        seen.transpose(0, 1).flatten(1, 2),
        (C * len(weight), *weight.shape[1:]),
        delta.transpose(0, 1).flatten(1, 2),
        layer.stride,
        layer.padding,
        layer.dilation,
        groups=C,
    )
    return grouped.view(C, *weight.shape)


Traced = list[tuple[nn.Module, Tensor, GradientEdge]]


@contextmanager
def _traced(net: nn.Module) -> Iterator[Traced]:
    """What each layer is given, and where in the graph it returns; an in-place ReLU after it changes neither."""
    traced: Traced = []
    hooks = [
        module.register_forward_hook(lambda m, inputs, out: traced.append((m, inputs[0], get_gradient_edge(out))))
        for module in net.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    with removing(hooks):
        yield traced


def _shapes(gradients: Sequence[Tensor]) -> list[list[int]]:
    return [list(g.shape) for g in gradients]
