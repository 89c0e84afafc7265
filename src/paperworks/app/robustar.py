"""The page of a Robustar project: browse, explain, annotate, propose, train on. Every handler is also an API."""

from __future__ import annotations

import hashlib
import html
import shutil
import socket
from collections.abc import Callable
from functools import wraps
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import uvicorn
from fastapi import FastAPI
from matplotlib import colormaps
from PIL import Image
from starlette.middleware.trustedhost import TrustedHostMiddleware

from paperworks.audit.robustar import FILLS, PROPOSERS, RobustarProject, shrink_mask
from paperworks.audit.robustar.files import MAX_PIXELS
from paperworks.audit.robustar.project import VIEWS
from paperworks.audit.robustar.saliency import KINDS
from paperworks.errors import MissingExtra, UserError
from paperworks.files import write_whole

try:
    import gradio as gr
except ImportError as error:
    raise MissingExtra("gradio", "app", "the page of Robustar") from error

PER_PAGE = 60
LARGEST = 64 * 2**20  # bytes of an upload
ALL = "all classes"
VERDICTS = {"all": None, "correct": True, "incorrect": False}
MARK = (255, 0, 80)
CSS = "#gallery .grid-container {grid-template-columns: repeat(auto-fill, minmax(92px, 1fr)) !important}"
_SIDE = 512  # small images are enlarged to about this

F = TypeVar("F", bound=Callable[..., Any])


def mask_editor(**options: Any) -> gr.ImageEditor:
    """An editor that gives its handlers the painted pixels, read from PNG files of bounded size only.

    Not a subclass: of one, Gradio writes an interface file into the package at each import.
    """
    editor = gr.ImageEditor(**options)

    def painted(payload: Any) -> np.ndarray | None:
        if payload is None:
            return None
        kept = editor.blob_storage.pop(payload.id, None) if payload.id is not None else payload
        layers = [_alpha(layer) >= 128 for layer in (kept.layers if kept else []) if layer is not None]
        if any(layer.shape != layers[0].shape for layer in layers):
            raise gr.Error("the layers differ in size", print_exception=False)
        return np.logical_or.reduce(layers) if layers else None

    editor.preprocess = painted  # type: ignore[assignment, method-assign]
    return editor


def _alpha(layer: Any) -> np.ndarray:
    source = BytesIO(layer) if isinstance(layer, bytes) else Path(layer.path)
    try:
        with Image.open(source, formats=("PNG",)) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise UserError("too large")
            return np.asarray(opened.convert("RGBA"))[..., 3]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise gr.Error("a layer of the drawing is not a PNG image", print_exception=False) from error


def told(handler: F) -> F:
    """Show a user's errors as a message of text, without a traceback."""

    @wraps(handler)
    def answer(*args: Any) -> Any:
        try:
            return handler(*args)
        except UserError as error:
            raise gr.Error(html.escape(" ".join(str(error).split())), print_exception=False) from error

    return answer  # type: ignore[return-value]


class _Handlers:
    """What the page asks of a project; images are called by name, so that nothing depends on the browser's state."""

    def __init__(self, project: RobustarProject) -> None:
        self.project, self.shown = project, project.thumbnails.parent / "shown"
        shutil.rmtree(self.shown, ignore_errors=True)
        self.shown.mkdir()

    @told
    def images(self, view: str, label: str, verdict: str, number: float) -> tuple[Any, Any, list[str], str]:
        """A page of thumbnails, its number, the names on it, and how many there are."""
        correct = VERDICTS.get(verdict)
        chosen = None if label == ALL else label
        page = self.project.images(view, label=chosen, correct=correct, page=int(number or 1), per_page=PER_PAGE)
        shown = []
        for entry in page.entries:
            try:
                shown.append((str(self.project.thumbnail(entry.name)), entry.name.partition("/")[2]))
            except UserError:
                continue  # unreadable: listed under "skipped"
        names = [entry.name for entry in page.entries if entry.name not in self.project.skipped]
        count = f"{page.total} images, {page.pages} pages"
        if correct is not None and not page.total:
            count = "none so far: let the model predict this split"
        return shown, page.number, names, count

    @told
    def open(self, name: str) -> tuple[Any, Any, dict[str, float], str]:
        """An image in the editor, with its accepted mask; the picture beside it; its probabilities."""
        pixels = self.project.read(name)
        note = self.project.stale().get(name, "") if self.project.load_mask(name) is not None else ""
        shown = self._picture(_enlarged(pixels, self._factor(pixels)))
        return self._editor(name, self.project.load_mask(name)), shown, self.project.predict(name), note

    @told
    def predict(self, name: str) -> dict[str, float]:
        """Probability of each class."""
        return self.project.predict(name)

    @told
    def explain(self, name: str, kind: str) -> str:
        """An image under its saliency."""
        heat = self.project.saliency(name, kind)
        heat = heat / max(float(heat.max()), 1e-12)
        colour = colormaps["inferno"](heat)[..., :3] * 255
        weight = 0.25 + 0.65 * heat[..., None]
        pixels = self.project.read(name)
        blended = (pixels * (1 - weight) + colour * weight).astype(np.uint8)
        return self._picture(_enlarged(blended, self._factor(pixels)))

    @told
    def influence(self, name: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        """The training images that help and that harm the recognition of an image most."""
        found = self.project.influence(name)
        helpful, harmful = (
            [(str(self.project.thumbnail(other)), f"{value:+.3g} {other}") for other, value in rows]
            for rows in (found.helpful, found.harmful)
        )
        return helpful, harmful

    @told
    def save_mask(self, name: str, painted: np.ndarray | None) -> str:
        """Accept what is painted as the mask of an image."""
        self.project.save_mask(name, self._mask(name, painted))
        return f"saved the mask of {name}"

    @told
    def load_proposal(self, name: str) -> Any:
        """The proposed mask of an image in the editor."""
        mask = self.project.load_mask(name, proposal=True)
        if mask is None:
            raise UserError(f"there is no proposal for {name}")
        return self._editor(name, mask)

    @told
    def clear_drawing(self, name: str) -> Any:
        """The image in the editor without anything painted; the saved mask stays."""
        return self._editor(name, None)

    @told
    def delete_mask(self, name: str) -> tuple[str, Any]:
        """Move the mask of an image to the trash."""
        there = self.project.delete_mask(name)
        return f"moved the mask of {name} to the trash" if there else "there was no mask", self._editor(name, None)

    @told
    def mark_colour(self, name: str, painted: np.ndarray | None, tolerance: float, x: float, y: float) -> Any:
        """Also paint all pixels whose colour is within a tolerance of that at a place of the picture."""
        pixels = self.project.read(name).astype(int)
        factor = self._factor(pixels)
        column, row = int(x) // factor, int(y) // factor
        height, width = pixels.shape[:2]
        if not (0 <= row < height and 0 <= column < width):
            size = f"{width * factor}x{height * factor}"
            raise UserError(f"the place must be inside the picture of {size} pixels, got {x}, {y}")
        alike = np.abs(pixels - pixels[row, column]).max(2) <= tolerance
        before = self._mask(name, painted) if painted is not None else np.zeros_like(alike)
        return self._editor(name, before | alike)

    @told
    def next_name(self, name: str, names: list[str]) -> str:
        """The image after this one on the page, or itself at the end."""
        position = names.index(name) + 1 if name in names else 0
        return names[position] if position < len(names) else name

    @told
    def clear_masks(self, sure: str) -> str:
        """Move all accepted masks to the trash, if the person typed that they are sure."""
        if sure != "clear all":
            raise UserError("type: clear all")
        return f"moved {self.project.clear_masks()} masks to the trash"

    # Long work.

    @told
    def predict_all(self, split: str) -> str:
        """Let the model look at a whole split."""
        return str(self.project.tasks.start("predict", lambda task: self.project.predict_all(split, task)))

    @told
    def propose(self, proposer: str, start: float, end: float) -> str:
        """Propose masks for training images by position; end -1 is the last."""
        work = self.project.propose
        return str(self.project.tasks.start("propose", lambda task: work(proposer, int(start), int(end), task)))

    @told
    def train(self, epochs: float, lr: float, lam: float, fill: str, batch_size: float) -> str:
        """Continue training on pairs."""
        options: dict[str, Any] = {
            "epochs": int(epochs),
            "lr": lr,
            "lam": lam,
            "fill": fill,
            "batch_size": int(batch_size),
        }
        return str(self.project.tasks.start("train", lambda task: self.project.train(task, **options)))

    def cancel(self) -> str:
        """Ask the running task to stop."""
        self.project.tasks.cancel()
        return self.status()[0]

    def status(self) -> tuple[str, list[list[str]], Any, Any]:
        """How the last task goes, what training changed, the checkpoints, and whether to ask again."""
        task = self.project.tasks.last
        running = task is not None and task.state == "running"
        rows = []
        if task is not None and task.state == "done" and task.name == "train":
            for found in task.result:
                share = "" if found.saliency_in_masks is None else f"{found.saliency_in_masks:.3f}"
                worst = f"{found.worst_class[0]}: {found.worst_class[1]:.1%}"
                rows.append([found.checkpoint, f"{found.accuracy:.1%}", worst, share])
        names = self.project.checkpoints()
        chosen = self.project.checkpoint if self.project.checkpoint in names else None
        return str(task or "nothing is running"), rows, gr.Dropdown(names, value=chosen), gr.Timer(active=running)

    @told
    def use(self, name: str) -> str:
        """Make a checkpoint the current model."""
        if (task := self.project.tasks.last) is not None and task.state == "running":
            raise UserError(f"{task}: wait for it or cancel it first")
        self.project.use(name)
        return f"checkpoint {name} is in use"

    # Masks out and in.

    @told
    def export_masks(self) -> str:
        """A ZIP archive of all accepted masks."""
        path = self.shown / "masks.zip"
        write_whole(path, self.project.export_masks(), durable=False)
        return str(path)

    @told
    def import_masks(self, archive: bytes | None, white: bool) -> str:
        """Accept the masks of an archive as exported, or of pictures painted white."""
        if archive is None:
            raise UserError("choose an archive first")
        report = self.project.import_masks(archive, white=white)
        refused = [f"{name}: {reason}" for name, reason in report.refused.items()]
        return "\n".join([f"accepted {report.accepted}, refused {len(refused)}", *refused[:20]])

    @told
    def skipped(self) -> str:
        """Files that are left out, and masks that do not apply, with reasons."""
        found = self.project.skipped | self.project.stale()
        return "\n".join(f"{name}: {reason}" for name, reason in found.items()) or "nothing"

    # The drawing.

    def _factor(self, pixels: np.ndarray) -> int:
        return max(1, _SIDE // max(pixels.shape[:2]))

    def _mask(self, name: str, painted: np.ndarray | None) -> np.ndarray:
        pixels = self.project.read(name)
        factor = self._factor(pixels)
        height, width = pixels.shape[:2]
        if painted is None:
            return np.zeros((height, width), bool)
        if painted.shape != (height * factor, width * factor):
            raise UserError(
                f"the drawing of {name} must be {width * factor}x{height * factor} pixels, "
                f"got {painted.shape[1]}x{painted.shape[0]}"
            )
        return shrink_mask(painted, factor)

    def _editor(self, name: str, mask: np.ndarray | None) -> dict[str, Any]:
        pixels = self.project.read(name)
        factor = self._factor(pixels)
        large = _enlarged(pixels, factor)
        layer = np.zeros((*large.shape[:2], 4), np.uint8)
        if mask is not None and mask.shape == pixels.shape[:2]:
            layer[_enlarged(mask, factor)] = (*MARK, 255)
        shown = np.where(layer[..., 3:] > 0, layer[..., :3], large)
        named = {"background": large, "layers": layer, "composite": shown}
        value: dict[str, Any] = {part: self._picture(pixels) for part, pixels in named.items()}
        return value | {"layers": [value["layers"]]}

    def _picture(self, pixels: np.ndarray) -> str:
        """A PNG file of pixels. Gradio's own cache is not safe against two that write and read one file at a time."""
        buffer = BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
        path = self.shown / f"{hashlib.sha256(buffer.getvalue()).hexdigest()[:32]}.png"
        if not path.exists():
            write_whole(path, buffer.getvalue(), durable=False)
        return str(path)


def _enlarged(pixels: np.ndarray, factor: int) -> np.ndarray:
    return pixels.repeat(factor, 0).repeat(factor, 1)


def create_app(project: RobustarProject) -> gr.Blocks:
    """The page of a project. ``mount`` puts it into a server with what it needs beside it.

    Of the disk, it serves the thumbnails and what it shows itself, nothing else.
    """
    handle = _Handlers(project)
    gr.set_static_paths([project.thumbnails, handle.shown])  # which are served in place, not copied
    with gr.Blocks(title="Robustar", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400)) as page:
        gr.Markdown(
            "# Robustar\nFind the pixels that the model wrongly relies on, mark them, and train on without them."
        )
        with gr.Row():
            view = gr.Dropdown(list(VIEWS), value="train", label="Images", min_width=120)
            label = gr.Dropdown([ALL, *project.classes], value=ALL, label="Class", min_width=120)
            verdict = gr.Dropdown(list(VERDICTS), value="all", label="Recognised by the model", min_width=120)
            number = gr.Number(1, label="Page", precision=0, minimum=1, min_width=80)
            found = gr.Textbox(label="Found", interactive=False, min_width=140)
        names = gr.JSON(visible=False)
        gallery = gr.Gallery(
            label="Images",
            columns=10,
            height=300,
            allow_preview=False,
            object_fit="contain",
            buttons=[],
            elem_id="gallery",
        )
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                current = gr.Textbox(label="Image", placeholder="choose one above", max_lines=1, elem_id="current")
                editor = mask_editor(
                    label="Brush over what the model should not use",
                    type="numpy",
                    image_mode="RGBA",
                    format="png",
                    layers=False,
                    transforms=(),
                    sources=(),
                    buttons=[],
                    canvas_size=(_SIDE, _SIDE),
                    height=600,
                    fixed_canvas=False,
                    brush=gr.Brush(default_size=12, colors=["#ff0050"], color_mode="fixed"),
                    eraser=gr.Eraser(default_size=12),
                    elem_id="editor",
                )
                with gr.Row():
                    save = gr.Button("Save mask, next image", variant="primary", min_width=160)
                    proposal = gr.Button("Start from proposal", min_width=140)
                    clear = gr.Button("Clear drawing", min_width=110)
                    delete = gr.Button("Delete mask", variant="stop", min_width=110)
                said = gr.Textbox(label="Last action", interactive=False, lines=1, elem_id="said")
            with gr.Column(scale=2, min_width=320):
                picture = gr.Image(
                    label="Click a colour to mark all pixels like it", interactive=False, format="png", buttons=[],
                    elem_id="picture",
                )  # fmt: skip
                tolerance = gr.Slider(0, 255, 12, step=1, label="Tolerance of the colour")
                probabilities = gr.Label(label="The model says", num_top_classes=5)
                with gr.Row():
                    kind = gr.Dropdown(list(KINDS), value="gradient", label="Saliency", min_width=120)
                    explain = gr.Button("Show saliency", min_width=120)
                with gr.Accordion("Training images that matter", open=False):
                    gr.Markdown("Negative influence helps: more weight for such an image lowers this image's loss.")
                    ask = gr.Button("Find them")
                    helpful = gr.Gallery(label="Most helpful", columns=4, height=180, allow_preview=False, buttons=[])
                    harmful = gr.Gallery(label="Most harmful", columns=4, height=180, allow_preview=False, buttons=[])
        task = gr.Textbox("nothing is running", label="Task", interactive=False, elem_id="task")
        with gr.Row():
            look = gr.Button("Predict this split", min_width=140)
            stop = gr.Button("Cancel task", variant="stop", min_width=120)
        timer = gr.Timer(1.0, active=False)
        with gr.Accordion("Propose masks", open=False), gr.Row():
            proposer = gr.Dropdown(list(PROPOSERS), value="saliency", label="How", min_width=120)
            start = gr.Number(0, label="From position", precision=0, min_width=90)
            end = gr.Number(-1, label="To position (-1: last)", precision=0, min_width=90)
            propose = gr.Button("Propose", min_width=100)
        with gr.Accordion("Train on pairs", open=False):
            with gr.Row():
                epochs = gr.Number(20, label="Epochs", precision=0, minimum=1, min_width=90)
                lr = gr.Number(0.01, label="Learning rate", min_width=90)
                lam = gr.Number(0.1, label="Consistency λ", min_width=90)
                fill = gr.Dropdown(list(FILLS), value="random_pure", label="Fill", min_width=120)
                batch = gr.Number(64, label="Batch size", precision=0, minimum=1, min_width=90)
            train = gr.Button("Train", variant="primary")
            changed = gr.Dataframe(
                headers=["checkpoint", "test accuracy", "worst class", "saliency in masks"],
                datatype="str",
                interactive=False,
                label="Before and after",
            )
            with gr.Row():
                checkpoint = gr.Dropdown([], label="Checkpoint", min_width=120)
                use = gr.Button("Use it", min_width=100)
        with gr.Accordion("Masks in and out, problems", open=False):
            with gr.Row():
                export = gr.Button("Export masks", min_width=120)
                exported = gr.File(label="Archive", interactive=False)
                archive = gr.File(label="Import masks", file_types=[".zip"], type="binary")
                white = gr.Checkbox(label="Pictures with spurious pixels painted white")
                take = gr.Button("Import", min_width=100)
            with gr.Row():
                sure = gr.Textbox(label="To move all masks to the trash, type: clear all", min_width=160)
                wipe = gr.Button("Clear all masks", variant="stop", min_width=120)
            problems = gr.Textbox(label="Left out", interactive=False, lines=3)
            list_problems = gr.Button("List what is left out")
        x, y = gr.Number(visible=False), gr.Number(visible=False)

        listing: dict[str, Any] = {
            "fn": handle.images,
            "inputs": [view, label, verdict, number],
            "outputs": [gallery, number, names, found],
        }
        opening: dict[str, Any] = {
            "fn": handle.open, "inputs": [current], "outputs": [editor, picture, probabilities, said],
        }  # fmt: skip
        asking: dict[str, Any] = {"fn": handle.status, "outputs": [task, changed, checkpoint, timer]}
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}

        # The public ones first: they get their names as they are.
        page.load(**listing, api_name="images")
        current.submit(**opening, api_name="open")
        timer.tick(**asking, show_progress="hidden", api_name="status")
        page.load(**asking, **quiet)
        for chooser in (view, label, verdict):
            chooser.input(lambda: 1, outputs=number, **quiet).then(**listing, **quiet)
        number.submit(**listing, **quiet)
        number.input(**listing, **quiet)

        def chosen(names: list[str], event: gr.SelectData) -> str:
            return names[event.index]

        gallery.select(chosen, names, current, **quiet).then(**opening, **quiet)
        gr.Button(visible=False).click(handle.predict, current, probabilities, api_name="predict")
        save.click(handle.save_mask, [current, editor], said, api_name="save_mask").success(
            handle.next_name, [current, names], current, **quiet
        ).then(**opening, **quiet)
        proposal.click(handle.load_proposal, current, editor, api_name="load_proposal")
        clear.click(handle.clear_drawing, current, editor, api_name="clear_drawing")
        delete.click(handle.delete_mask, current, [said, editor], api_name="delete_mask")

        def place(event: gr.SelectData) -> tuple[int, int]:
            return event.index[0], event.index[1]

        picture.select(place, None, [x, y], **quiet).then(
            handle.mark_colour, [current, editor, tolerance, x, y], editor, api_name="mark_colour"
        )
        explain.click(handle.explain, [current, kind], picture, api_name="explain")
        ask.click(handle.influence, current, [helpful, harmful], api_name="influence")
        for button, work, inputs, api in (
            (look, handle.predict_all, [view], "predict_all"),
            (propose, handle.propose, [proposer, start, end], "propose"),
            (train, handle.train, [epochs, lr, lam, fill, batch], "train"),
        ):
            button.click(work, inputs, task, api_name=api).success(**asking, **quiet)
        stop.click(handle.cancel, None, task, api_name="cancel")
        use.click(handle.use, checkpoint, said, api_name="use")
        export.click(handle.export_masks, None, exported, api_name="export_masks")
        take.click(handle.import_masks, [archive, white], problems, api_name="import_masks")
        wipe.click(handle.clear_masks, sure, said, api_name="clear_masks")
        list_problems.click(handle.skipped, None, problems, api_name="skipped")
    return page


def mount(app: FastAPI, project: RobustarProject, path: str = "/", auth: tuple[str, str] | None = None) -> FastAPI:
    """Put the page of a project into a server."""
    theme = gr.themes.Base(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )  # nothing is fetched
    return gr.mount_gradio_app(
        app,
        create_app(project).queue(default_concurrency_limit=4, max_size=64),
        path,
        auth=auth,
        show_error=True,
        max_file_size=LARGEST,
        footer_links=[],
        ssr_mode=False,
        pwa=False,
        theme=theme,
        css=CSS,
    )


def serve(
    project: RobustarProject,
    host: str,
    port: int,
    auth: tuple[str, str] | None = None,
    ready: Callable[[uvicorn.Server, str], None] = lambda server, address: None,
) -> None:
    """Serve a project until interrupted.

    Args:
        project: What to serve.
        host: Address to bind.
        port: Port to bind; 0 for any that is free.
        auth: User and password.
        ready: Called with the server and its address just before it runs.

    Raises:
        UserError: If another server works on the project, or the address cannot be bound.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    if auth is None:  # where no password guards, a name from elsewhere must not lead here (DNS rebinding)
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]", host])
    with project.locked():
        mount(app, project, auth=auth)
        try:
            bound = socket.create_server(
                (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=128
            )
        except OSError as error:
            raise UserError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3))
        shown = f"[{host}]" if ":" in host else host
        ready(server, f"http://{shown}:{bound.getsockname()[1]}")
        server.run(sockets=[bound])
