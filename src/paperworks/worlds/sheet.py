"""One picture of every sensor."""

import textwrap

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paperworks.worlds.camera import Views, render
from paperworks.worlds.flat import flat_scenes
from paperworks.worlds.language import refer, state
from paperworks.worlds.lidar import Lidar, scan
from paperworks.worlds.make import make_scene, rig
from paperworks.worlds.motion import animate
from paperworks.worlds.scene import Scene, corners

EDGES = [(0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4), (0, 4), (1, 5), (2, 6), (3, 7)]


def shown_scene(seed: int) -> Scene:
    """The scene of the sheet."""
    return make_scene(seed, things=(6, 6), resolution=(320, 240), fov=36.0)


def contact_sheet(seed: int = 0) -> Figure:
    """One scene through every sensor, and what else worlds make."""
    scene = shown_scene(seed)
    view = render(scene, samples=2)
    figure = Figure(figsize=(12, 10.4), layout="constrained", facecolor="white")
    grid = figure.add_gridspec(5, 12)

    def panel(row: int, start: int, stop: int, title: str) -> Axes:
        axes = figure.add_subplot(grid[row, start:stop])
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()
        return axes

    picture = view.image[0].permute(1, 2, 0).numpy()
    panel(0, 0, 3, "camera").imshow(picture)
    panel(0, 3, 6, "depth").imshow(view.depth[0].clamp(max=15), cmap="viridis")
    panel(0, 6, 9, "instances").imshow(_coloured(view.instances[0].numpy() + 1))
    panel(0, 9, 12, "classes").imshow(_coloured(view.semantic[0].numpy()))
    _boxes(panel(1, 0, 3, "boxes: whole (dashed) and visible"), view, picture)
    _solids(panel(1, 3, 6, "3-D boxes"), scene, picture)
    _cloud(panel(1, 6, 9, "LiDAR from above"), scene)
    _sentences(panel(1, 9, 12, ""), scene)
    for k, camera in enumerate(rig(scene, 6, resolution=(192, 128)).cameras):
        panel(2, 2 * k, 2 * k + 2, camera.name).imshow(_picture(scene.model_copy(update={"cameras": (camera,)})))
    small = scene.model_copy(update={"cameras": (scene.cameras[0].at(160, 120),)})
    clip = animate(small, "jump", frames=6, seed=seed)
    for k, frame in enumerate(clip.frames):
        panel(3, 2 * k, 2 * k + 2, f"“{clip.action}”, {k + 1} of 6").imshow(_picture(frame))
    for k, name in enumerate(("dusk", "night", "fog", "meadow")):
        place = make_scene(seed, things=(6, 6), resolution=(160, 120), fov=36.0, domain=name)
        panel(4, 2 * k, 2 * k + 2, f"domain {name}").imshow(_picture(place))
    flat = flat_scenes(2, seed=seed)
    for k in range(2):
        panel(4, 8 + 2 * k, 10 + 2 * k, "flat mode").imshow(flat.images[k].permute(1, 2, 0).numpy())
    return figure


def _picture(scene: Scene) -> np.ndarray:
    image: np.ndarray = render(scene, samples=2).image[0].permute(1, 2, 0).numpy()
    return image


def _coloured(ids: np.ndarray) -> np.ndarray:
    palette = np.vstack(
        [[0.12, 0.13, 0.16, 1.0], mpl.colormaps["Set2"](np.arange(8)), mpl.colormaps["Set1"](np.arange(9))]
    )
    coloured: np.ndarray = palette[ids % len(palette)]
    return coloured


def _boxes(axes: Axes, view: Views, picture: np.ndarray) -> None:
    axes.imshow(picture)
    for boxes, style in ((view.boxes(amodal=True)[0], "--"), (view.boxes()[0], "-")):
        for x1, y1, x2, y2 in (boxes - 0.5).tolist():
            axes.plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], style, color="white", linewidth=1)


def _solids(axes: Axes, scene: Scene, picture: np.ndarray) -> None:
    axes.imshow(picture)
    pixels = scene.cameras[0].project(corners(scene.boxes3d()))[..., :2] - 0.5
    for box in pixels.tolist():
        for a, b in EDGES:
            axes.plot(*zip(box[a], box[b], strict=True), color="#ffe14d", linewidth=0.8)


def _cloud(axes: Axes, scene: Scene) -> None:
    cloud = scan(scene, Lidar(position=(0.0, 0.0, 2.4), rings=64, elevation=(-70.0, 0.0)))
    near = cloud.points[:, :2].abs().amax(1) < 5
    colours = _coloured(cloud.instance[near].numpy() + 1)
    colours[cloud.instance[near].numpy() < 0] = (0.6, 0.65, 0.7, 1)
    x, y = cloud.points[near, :2].T.numpy()
    axes.scatter(x, y, s=1.2, c=colours, linewidths=0)
    axes.set_aspect("equal")


def _sentences(axes: Axes, scene: Scene) -> None:
    lines = [
        *(expression.text for hops in (0, 1, 2) for expression in refer(scene, hops=hops, seed=1)),
        *(f"{statement.text}: {str(statement.truth).lower()}" for statement in state(scene, count=2, seed=1)),
    ]
    text = "\n".join(textwrap.fill(line, 38, initial_indent="• ", subsequent_indent="   ") for line in lines)
    axes.text(0, 0.98, text, va="top", fontsize=8.5, linespacing=1.4, transform=axes.transAxes)
