"""``paperworks robustar``: the page of a Robustar project."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paperworks.errors import UserError, nearest

from .models import load_weights, make_model

if TYPE_CHECKING:
    from torch import nn

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@click.group()
def robustar() -> None:
    """Find the pixels a classifier wrongly relies on, mask them, and train on without them."""


@robustar.command()
@click.argument("root", type=click.Path(path_type=Path))
@click.option(
    "--model",
    required=True,
    metavar="NAME",
    help="A classifier of torchvision (resnet18 …), or package.module:function, called with the number of classes.",
)
@click.option("--weights", type=click.Path(path_type=Path), metavar="FILE", help="Its state dict: .safetensors or .pt.")
@click.option("--image-size", type=int, metavar="N", help="Side to which images are scaled for the model.")
@click.option("--channels", type=click.Choice(["1", "3"]), default="3", show_default=True, help="The model's input.")
@click.option("--mean", default="0", show_default=True, metavar="A[,B,C]", help="Subtracted from pixels in [0, 1].")
@click.option("--std", default="1", show_default=True, metavar="A[,B,C]", help="Then divided by.")
@click.option("--device", default="cpu", show_default=True, help="Where the model runs: cpu, cuda.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to bind.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=7860, show_default=True, help="Port; 0 takes a free one."
)
@click.option(
    "--auth", metavar="USER:PASSWORD", envvar="PAPERWORKS_AUTH", help="Who may enter; needed beyond loopback."
)
def serve(root: Path, host: str, port: int, auth: str | None, **model: Any) -> None:
    """Serve the page of the project in ROOT: train|validation|test/<class>/<image>."""
    credentials = _credentials(auth)
    if host not in LOOPBACK:
        if credentials is None:
            raise UserError(f"--host {host} opens the page to others: give --auth USER:PASSWORD")
        click.echo(f"warning: everyone who reaches {host} and knows the password can change {root}", err=True)
    from paperworks.app.robustar import serve as run

    project = open_project(root, **model)
    if project.checkpoints():
        click.echo(f"continuing with checkpoint {project.checkpoint} of {project.root / 'checkpoints'}")
    run(project, host, port, credentials, lambda _, address: click.echo(f"Robustar: {address}  (Ctrl-C ends it)"))


def open_project(
    root: Path,
    *,
    model: str,
    weights: Path | None,
    image_size: int | None,
    channels: str,
    mean: str,
    std: str,
    device: str,
) -> Any:
    """The project of a folder with the model that the options name."""
    from paperworks.audit.robustar import Preprocess, RobustarProject

    train = root / "train"
    if not train.is_dir():
        raise UserError(f"there is no folder {train} (train/<class>/<image>)")
    classes = sorted(path.name for path in train.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise UserError(f"{train} holds no class folders (train/<class>/<image>)")
    made = make_classifier(model, len(classes))
    if weights is not None:
        load_weights(made, weights)
    try:
        made = made.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from error
    side = (image_size, image_size) if image_size else None
    transform = Preprocess(side, 1 if channels == "1" else 3, _numbers("mean", mean), _numbers("std", std))
    return RobustarProject(root, made, classes, transform)


def make_classifier(name: str, num_classes: int) -> nn.Module:
    """A classifier by its name."""
    if ":" in name:
        return make_model(name, num_classes)
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise UserError(f"--model {name!r} is no classifier of torchvision.{nearest(name, known)}")
    return models.get_model(name, num_classes=num_classes)


def _credentials(auth: str | None) -> tuple[str, str] | None:
    if auth is None:
        return None
    user, colon, password = auth.partition(":")
    if not (user and colon and password):
        raise UserError("--auth must be USER:PASSWORD, neither of them empty")
    return user, password


def _numbers(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"--{name} must be numbers with commas between, got {text!r}") from error
