"""Models as users name them on the command line, and their weights."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from paperworks.errors import UserError, nearest

if TYPE_CHECKING:
    from torch import nn


def make_model(name: str, *arguments: object) -> nn.Module:
    """The model that ``package.module:callable``, imported also from this folder, returns for ``arguments``.

    What is named may also be a model itself.
    """
    from torch import nn

    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise UserError(f"a model must be package.module:callable, e.g. torchvision.models:resnet18, got {name!r}")
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise UserError(f"cannot import {module_name}: {error}") from error
    finally:
        sys.path.pop(0)
    if not hasattr(module, attribute):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"{module_name} has no {attribute!r}.{nearest(attribute, public)}")
    make = getattr(module, attribute)
    try:
        made = make(*arguments) if callable(make) and not isinstance(make, nn.Module) else make
    except TypeError as error:
        raise UserError(f"{name} cannot be made: {error}") from error
    if not isinstance(made, nn.Module):
        raise UserError(f"{name} must return an nn.Module, got {type(made).__name__}")
    return made


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict, ``.safetensors`` or ``.pt``, as data only."""
    import torch
    from safetensors.torch import load_file

    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        model.load_state_dict(state)
    except Exception as error:  # many kinds, by the way in which a file is none
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} holds no weights of this model: {reason}") from error
