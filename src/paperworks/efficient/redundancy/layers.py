"""Putting layers in the place of others and back, and when a layer should not use its technique."""

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

from torch import nn

from paperworks.errors import UserError, unknown

_LONGEST = 32  # calls; so that looking in vain costs little


class Replaced:
    """Layers that stand in the place of others in a model. As a context, it restores them at the end.

    Attributes:
        layers: The new layers by name.
    """

    def __init__(self, model: nn.Module, originals: dict[str, nn.Module], layers: dict[str, nn.Module]) -> None:
        self._model, self._originals, self.layers = model, originals, layers
        self._put(originals, layers)

    def restore(self) -> None:
        """Put the very modules back that were there before."""
        self._put(self.layers, self._originals)

    def __enter__(self) -> "Replaced":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def _put(self, old: dict[str, nn.Module], new: dict[str, nn.Module]) -> None:
        swap = {id(module): new[name] for name, module in old.items()}
        parents = [module for module in self._model.modules() if id(module) not in swap]
        for parent in parents:  # a shared layer has several
            for key, child in parent._modules.items():
                if id(child) in swap:
                    parent._modules[key] = swap[id(child)]


def replace_layers(model: nn.Module, layers: Iterable[str], make: Callable[[Any], nn.Module]) -> Replaced:
    """Apply a technique to layers of a model, in place.

    Args:
        model: The model.
        layers: Names of layers, as in ``model.named_modules()``.
        make: Gives the new layer for an old one, e.g. ``ReuseConv2d.from_layer``.

    Returns:
        What undoes it, by ``restore()`` or at the end of a ``with`` block.

    Raises:
        UserError: If a name is unknown, none is given, or a layer does not suit the technique; the model is
            unchanged then.

    Example:
        >>> with replace_layers(model, ["layer3.0.conv1"], partial(ReuseConv2d.from_layer, bits=12)):
        ...     outputs = model(images)
    """
    modules = {name: module for name, module in model.named_modules() if name}
    names = [layers] if isinstance(layers, str) else list(dict.fromkeys(layers))
    if not names:
        raise UserError("layers must name at least one layer, got none")
    originals, new = {}, {}
    for name in names:
        if name not in modules:
            raise unknown("layer", name, modules)
        originals[name] = modules[name]
        try:
            new[name] = make(modules[name])
        except UserError as error:
            raise UserError(f"layer {name!r}: {error}") from None
    return Replaced(model, originals, new)


def check_convolution(layer: nn.Module, technique: str) -> nn.Conv2d:
    """The layer, if the technique can compute it; else ``UserError``."""
    if not isinstance(layer, nn.Conv2d):
        raise UserError(f"{technique} takes an nn.Conv2d, got {type(layer).__name__}")
    if layer.groups != 1:
        raise UserError(f"{technique} takes convolutions with groups=1, got groups={layer.groups}")
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise UserError(f"{technique} takes zero padding by numbers, got {layer.padding!r} {layer.padding_mode!r}")
    return layer


class BackOff:
    """Decides when a layer that did not gain looks again: after 1, 2, 4 … and at last every 32 calls."""

    def __init__(self) -> None:
        self._left, self._next = 0, 1

    def resting(self) -> bool:
        """Whether this call is to be dense, without a look."""
        self._left -= self._left > 0
        return self._left > 0

    def report(self, gained: bool) -> None:
        """Say whether the technique gained in this call."""
        self._left = 0 if gained else self._next
        self._next = 1 if gained else min(2 * self._next, _LONGEST)
