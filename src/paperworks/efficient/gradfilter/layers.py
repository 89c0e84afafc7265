"""The filtered convolution as a layer, and models whose convolutions become such layers in place."""

from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeGuard

from jaxtyping import Float
from torch import Tensor, nn

from paperworks.errors import UserError, unknown

from .conv import check_convolution, filtered_conv2d

Layers = str | Iterable[str] | Callable[[str, nn.Conv2d], bool]


class FilteredConv2d(nn.Conv2d):
    """``torch.nn.Conv2d`` whose gradients are filtered by patches; see ``filtered_conv2d``.

    Parameters, ``state_dict`` and output are those of ``nn.Conv2d``.

    Args:
        *args, **keywords: As for ``nn.Conv2d``; ``padding_mode`` must be ``"zeros"``.
        patch: Side of a patch of the output map.
        stride_correction: See ``filtered_conv2d``.

    Attributes:
        enabled: Whether gradients are filtered; may be switched at any time.

    Raises:
        UserError: If ``patch`` is out of range, or the gradient of such a convolution cannot be filtered.

    Example:
        >>> layer = FilteredConv2d(64, 128, 3, padding=1, patch=4)
    """

    patch: int
    stride_correction: bool
    enabled: bool

    def __init__(self, *args: Any, patch: int = 2, stride_correction: bool = True, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        _filter(self, patch, stride_correction)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, patch: int = 2, *, stride_correction: bool = True) -> "FilteredConv2d":
        """A filtered layer with the very parameters of ``conv``, not copies; hooks stay with ``conv``."""
        sizes = conv.in_channels, conv.out_channels, conv.kernel_size
        names = ("stride", "padding", "dilation", "groups", "padding_mode")
        options: dict[str, Any] = {name: getattr(conv, name) for name in names}
        layer = cls(
            *sizes,
            bias=conv.bias is not None,
            device="meta",
            patch=patch,
            stride_correction=stride_correction,
            **options,
        )
        layer.weight, layer.bias = conv.weight, conv.bias
        return layer.train(conv.training)

    def _conv_forward(
        self,
        input: Float[Tensor, "*batch in_channels height width"],
        weight: Float[Tensor, "out_channels in_per_group kh kw"],
        bias: Float[Tensor, "out_channels"] | None,
    ) -> Float[Tensor, "*batch out_channels rows columns"]:
        if not self.enabled:
            return super()._conv_forward(input, weight, bias)
        geometry: dict[str, Any] = {name: getattr(self, name) for name in ("stride", "padding", "dilation", "groups")}
        correction = self.stride_correction
        return filtered_conv2d(input, weight, bias, **geometry, patch=self.patch, stride_correction=correction)

    def extra_repr(self) -> str:
        text = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{text}, patch={self.patch}" + ("" if self.enabled else ", enabled=False")


def apply_gradient_filter(
    model: nn.Module,
    layers: Layers = "last:2",
    patch: int = 2,
    *,
    stride_correction: bool = True,
    auto: bool = False,
    input_shape: tuple[int, ...] | None = None,
) -> list[str]:
    """Filter the gradients of a model's convolutions from now on.

    The layers change in place: parameters, hooks, names and references to the modules stay what they are, so that
    optimizers and hooks go on working.

    Args:
        model: Any model; only its plain ``nn.Conv2d`` layers can be chosen.
        layers: Names of layers; ``"last:k"`` for the last ``k`` convolutions in the order of the model's definition;
            ``"all"``; or a predicate ``(name, conv) -> bool``.
        patch: Side of a patch of the output map.
        stride_correction: See ``filtered_conv2d``.
        auto: Leave out chosen layers whose backward pass is not predicted to become faster by
            ``cost.MIN_GAIN`` at least. Needs ``input_shape``.
        input_shape: Shape of a batch, for ``auto``, e.g. ``(32, 3, 224, 224)``.

    Returns:
        The names of the filtered layers.

    Raises:
        UserError: If ``layers`` matches nothing, names what cannot be filtered or is filtered already, or ``patch``
            is out of range. The model is unchanged then.

    Example:
        >>> names = apply_gradient_filter(model, "last:4", patch=2)
        >>> freeze_except(model, [*names, "fc"])
    """
    chosen = _choose(model, layers)
    for name, conv in chosen.items():
        try:
            _check(conv, patch)
        except UserError as error:
            raise UserError(f"layer {name!r}: {error}") from None
    if auto:
        from .cost import MIN_GAIN, backward_cost

        if input_shape is None:
            raise UserError("auto=True needs input_shape, the shape of a batch")
        gains = backward_cost(model, input_shape, chosen, patch=patch).gain
        chosen = {name: conv for name, conv in chosen.items() if name in gains and gains[name].min() >= MIN_GAIN}
    for conv in chosen.values():
        # Another module in its place would lose hooks and leave behind references to the old one.
        conv.__class__ = FilteredConv2d
        _filter(conv, patch, stride_correction)
    return list(chosen)


def remove_gradient_filter(model: nn.Module, layers: Iterable[str] | None = None) -> list[str]:
    """Make filtered convolutions plain ``nn.Conv2d`` again, in place.

    Args:
        model: The model.
        layers: Their names; by default every ``FilteredConv2d`` in the model.

    Returns:
        The names of the layers.

    Raises:
        UserError: If a name is no filtered convolution.
    """
    filtered = {name: module for name, module in model.named_modules() if isinstance(module, FilteredConv2d)}
    chosen = list(filtered) if layers is None else list(layers)
    for name in chosen:
        if name not in filtered:
            raise unknown("filtered layer", name, filtered)
    for name in chosen:
        conv = filtered[name]
        del conv.patch, conv.stride_correction, conv.enabled
        conv.__class__ = nn.Conv2d  # type: ignore[assignment]
    return chosen


def filterable(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether a module is a convolution whose gradient can be filtered, or is."""
    if not isinstance(module, nn.Conv2d) or type(module) not in (nn.Conv2d, FilteredConv2d):
        return False
    try:
        _check(module, patch=1)
    except UserError:
        return False
    return True


def _filter(conv: nn.Module, patch: int, stride_correction: bool) -> None:
    assert isinstance(conv, FilteredConv2d)
    _check(conv, patch)
    conv.patch, conv.stride_correction, conv.enabled = patch, stride_correction, True


def _check(conv: nn.Conv2d, patch: int) -> None:
    if conv.padding_mode != "zeros":
        raise UserError(f"padding_mode must be 'zeros', got {conv.padding_mode!r}")
    channels = conv.in_channels, conv.out_channels
    check_convolution(patch, conv.stride, conv.padding, conv.groups, *channels)  # type: ignore[arg-type]


def _choose(model: nn.Module, layers: Layers) -> dict[str, nn.Conv2d]:
    modules = dict(model.named_modules())
    convs = {name: module for name, module in modules.items() if type(module) is nn.Conv2d}
    if not convs:
        raise UserError(f"{type(model).__name__} has no plain nn.Conv2d whose gradient could be filtered")
    if callable(layers):
        chosen = [name for name, conv in convs.items() if layers(name, conv)]
        if not chosen:
            raise UserError(f"layers: the predicate chose none of the {len(convs)} convolutions")
    elif layers == "all":
        chosen = list(convs)
    elif isinstance(layers, str) and layers.startswith("last:"):
        chosen = list(convs)[-_count(layers, len(convs)) :]
    else:
        chosen = [layers] if isinstance(layers, str) else list(dict.fromkeys(layers))
        for name in chosen:
            _check_name(name, modules, convs)
        if not chosen:
            raise UserError("layers must name at least one layer, got none")
    return {name: convs[name] for name in chosen}


def _count(layers: str, available: int) -> int:
    text = layers.removeprefix("last:")
    if not text.isdecimal() or not 1 <= int(text) <= available:
        raise UserError(f"layers must be 'last:k' with k from 1 to the {available} convolutions, got {layers!r}")
    return int(text)


def _check_name(name: str, modules: dict[str, nn.Module], convs: Collection[str]) -> None:
    if name not in modules:
        raise unknown("layer", name, convs)
    if isinstance(modules[name], FilteredConv2d):
        raise UserError(f"layer {name!r} is filtered already; remove_gradient_filter(model) undoes it")
    if name not in convs:
        kind = type(modules[name]).__name__
        raise UserError(f"layer {name!r} is a {kind}: only plain nn.Conv2d layers can be filtered")
