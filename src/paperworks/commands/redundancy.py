"""``paperworks redundancy``: the profiler from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from paperworks.errors import UserError

from .models import load_weights, make_model

if TYPE_CHECKING:
    from torch import Tensor


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def redundancy() -> None:
    """Where a model repeats work on its data, and what could be saved."""


@redundancy.command()
@click.argument("model")
@click.option("--data", metavar="SOURCE", help="Images: a name, folder or file that paperworks.data.load takes.")
@click.option("--clip", type=click.Path(path_type=Path), metavar="VIDEO", help="A video file or folder of frames.")
@click.option("--weights", type=click.Path(path_type=Path), metavar="FILE", help="A state dict: .safetensors or .pt.")
@click.option("--image-size", type=int, metavar="PIXELS", help="Side to scale images to.  [default: as they are]")
@click.option("--limit", type=int, default=256, show_default=True, metavar="N", help="How many images or frames.")
@click.option("--batch-size", type=int, default=32, show_default=True, metavar="N", help="Examples a forward pass.")
@click.option("--min-gain", type=float, default=1.2, show_default=True, help="Least gain that is recommended.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Write the report: .html or .json.")
@click.option(
    "--data-root", type=click.Path(path_type=Path), envvar="PAPERWORKS_DATA", metavar="DIR", help="Folder of data sets."
)
def profile(
    model: str,
    data: str | None,
    clip: Path | None,
    weights: Path | None,
    image_size: int | None,
    limit: int,
    batch_size: int,
    min_gain: float,
    out: Path | None,
    data_root: Path | None,
) -> None:
    """Measure how redundant MODEL's work on some data is.

    MODEL is package.module:callable, which is imported (also from this folder), called without arguments and returns
    an nn.Module, e.g. torchvision.models:resnet18.
    """
    if (data is None) == (clip is None):
        raise UserError("give either --data or --clip")
    if limit < 1 or batch_size < 1:
        raise UserError(f"--limit and --batch-size must be at least 1, got {limit} and {batch_size}")
    if out is not None and out.suffix not in (".html", ".json"):
        raise UserError(f"--out must end in .html or .json, got {out.name!r}")
    import torch

    from paperworks.efficient.redundancy import RedundancyProfiler

    network = make_model(model)
    if weights is not None:
        load_weights(network, weights)
    examples = _images(data, data_root, image_size, limit) if data is not None else _frames(clip, image_size, limit)
    try:
        report = RedundancyProfiler(network).run(torch.split(examples, batch_size), temporal=clip is not None)
    except (RuntimeError, TypeError) as error:
        shape = list(examples[:batch_size].shape)
        raise UserError(f"{model} takes no batch of shape {shape}: {str(error).splitlines()[0]}") from error
    advice = report.recommend(min_gain)
    table = report.to_frame()[["layer", "class", "name", "value", "cost", "error"]]
    click.echo(table.to_string(index=False, float_format="{:.3f}".format, na_rep=""))
    click.echo()
    for found in advice.to_dict("records"):
        layers = found["layers"]
        places = f"{len(layers)} layers" if len(layers) > 3 else ", ".join(layers)
        gain = f"predicted {found['gain']:.2f} times as fast"
        click.echo(f"{found['class']} {found['name']}: {found['technique']} at {places}: {gain}")
    if advice.empty:
        click.echo(f"nothing is predicted to make it {min_gain:g} times as fast")
    if out is not None:
        report.save(out)
        click.echo(f"Report: {out}")


def _images(source: str, root: Path | None, size: int | None, limit: int) -> Tensor:
    from paperworks.data import load

    data = load(source, root=root, image_size=size)
    return data.inputs[:limit]


def _frames(clip: Path | None, size: int | None, limit: int) -> Tensor:
    from paperworks.data.video import Sampling, read_clip

    assert clip is not None
    if not clip.exists():
        raise UserError(f"there is no {clip}")
    return read_clip(clip, Sampling(frames=limit, stride=1, size=size or 224)).transpose(0, 1)
