"""A folder of images, a classifier, and what people marked in between."""

import copy
import hashlib
import io
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torch.optim import SGD

from paperworks.errors import UserError, nearest, unknown
from paperworks.files import write_whole
from paperworks.train import Trainer, checkpoint

from . import files, masks
from .files import MAX_BYTES, SPLITS, Entry
from .fills import Mask, Pixels
from .influence import last_layer, last_layer_influence
from .masks import MaskFolder, StoredMask
from .paired import PairedImages, PairedTraining
from .preprocess import Preprocess
from .proposals import PROPOSERS, Proposer
from .saliency import saliency, saliency_share
from .state import Facts
from .tasks import Task, TaskManager

VIEWS = (*SPLITS, "annotated", "proposed")
_HIDDEN = ".robustar"


@dataclass(frozen=True)
class Page:
    """Some of the images that a query found.

    Attributes:
        entries: Those of this page.
        number, pages: Which page of how many; both at least 1.
        total: How many images were found.
    """

    entries: list[Entry]
    number: int
    pages: int
    total: int


@dataclass(frozen=True)
class Influences:
    """Training images by influence on the loss of one image; the strongest first, negative values help."""

    helpful: list[tuple[str, float]]
    harmful: list[tuple[str, float]]


@dataclass(frozen=True)
class Evaluation:
    """How good a checkpoint is.

    Attributes:
        checkpoint: Its name.
        accuracy: On the test split.
        worst_class: Its label and accuracy.
        saliency_in_masks: Mean share of the saliency inside the masks of annotated images; None without any.
    """

    checkpoint: str
    accuracy: float
    worst_class: tuple[str, float]
    saliency_in_masks: float | None


@dataclass
class Imported:
    """What an import took, and what it refused: name to reason."""

    accepted: int = 0
    refused: dict[str, str] = field(default_factory=dict)


class RobustarProject:
    """Images in ``<root>/train|validation|test/<class>/``, masks beside them, and the classifier they are about.

    Accepted masks lie in ``paired/<class>/<image file>.png`` (255 is spurious), proposals in ``proposed/``,
    checkpoints in ``checkpoints/``, everything else in ``.robustar/``. Images are called by their path inside the
    project, e.g. ``train/cat/1.jpg``; no other files are read or written, nor what a link leads to outside. Methods
    may be called from several threads.

    Args:
        root: The project's folder, with images of at least one class in ``train``.
        model: Images to logits. It is put into evaluation mode on its device; training works on a copy, which takes
            its place when it is finished.
        classes: Names by output; the sorted class folders of ``train`` if not given.
        transform: From 8-bit pixels to the model's input. It must keep the picture's frame (no crop), so that
            saliency can be laid over the image.

    Raises:
        UserError: If there is no such folder, or it holds no training images or a class that ``classes`` lacks.
    """

    def __init__(
        self,
        root: str | Path,
        model: nn.Module,
        classes: Sequence[str] | None = None,
        transform: Callable[[np.ndarray], Tensor] | None = None,
    ) -> None:
        self.root = Path(root).resolve()
        if not self.root.is_dir():
            raise UserError(f"there is no folder {root}")
        self.transform = transform or Preprocess()
        hidden = self.root / _HIDDEN
        if links := [path for path in (hidden, *hidden.glob("*")) if path.is_symlink()]:
            raise UserError(f"{links[0]} is a link: state must lie in the project itself")
        self.refresh()
        labels = sorted({entry.label for entry in self.entries.values()})
        if not any(entry.split == "train" for entry in self.entries.values()):
            raise UserError(f"{self.root} holds no training images (train/<class>/<image>)")
        self.classes = list(classes) if classes is not None else sorted({e.label for e in self._of("train")})
        if strange := [label for label in labels if label not in self.classes]:
            raise UserError(f"class folder {strange[0]!r} is not among the classes.{nearest(strange[0], self.classes)}")
        hidden.mkdir(exist_ok=True)
        self.thumbnails = hidden / "thumbnails"
        self.thumbnails.mkdir(exist_ok=True)
        self.accepted = MaskFolder(self.root, "paired", hidden / "trash")
        self.proposed = MaskFolder(self.root, "proposed", hidden / "trash")
        self.tasks = TaskManager()
        self._facts = Facts(hidden / "facts.sqlite")
        self._holding = threading.RLock()  # of the model: hooks and modes are not safe across threads
        self._writing = threading.Lock()  # of masks and checkpoints
        self._features: tuple[str, Any] | None = None
        self._install(model, "")
        if found := self.checkpoints():
            self.use(found[-1])

    # What is there.

    def refresh(self) -> None:
        """Look for images again."""
        found, self.skipped = files.scan(self.root)
        self.entries = {entry.name: entry for entry in found}

    def entry(self, name: str) -> Entry:
        """An image by its name.

        Raises:
            UserError: If the project has no such image, whatever else lies at that path.
        """
        if name not in self.entries:
            raise UserError(f"the project has no image {str(name)[:200]!r}")
        entry = self.entries[name]
        if not files.is_inside(self.root, entry.path):  # swapped for a link since the scan
            raise UserError(f"{name} is a link out of the project")
        return entry

    def images(
        self,
        view: str = "train",
        *,
        label: str | None = None,
        correct: bool | None = None,
        page: int = 1,
        per_page: int = 60,
    ) -> Page:
        """A page of images.

        Args:
            view: A split; or ``annotated`` or ``proposed``, the training images with such masks.
            label: Only this class.
            correct: Only images that the model recognises, or only those it does not; those that it has not looked
                at yet (``predict_all``) are neither.
            page: From 1; one beyond the last is the last.
            per_page: Images on it.
        """
        if view not in VIEWS:
            raise unknown("view", view, VIEWS)
        if label is not None and label not in self.classes:
            raise unknown("class", label, self.classes)
        if per_page < 1:
            raise UserError(f"per_page must be at least 1, got {per_page}")
        if view in SPLITS:
            found = self._of(view)
        else:
            folder = self.accepted if view == "annotated" else self.proposed
            found = folder.having(self._of("train"))
        if label is not None:
            found = [entry for entry in found if entry.label == label]
        if correct is not None:
            known = self.predictions()
            found = [e for e in found if e.name in known and (known[e.name] == e.label) == correct]
        pages = max(1, -(-len(found) // per_page))
        number = min(max(page, 1), pages)
        return Page(found[(number - 1) * per_page : number * per_page], number, pages, len(found))

    def read(self, name: str, side: int | None = None) -> Pixels:
        """An image's pixels as people see them; with ``side``, perhaps at a smaller size of at least that.

        Raises:
            UserError: If it cannot be read; it is then among ``skipped``.
        """
        entry = self.entry(name)
        try:
            return files.read_image(entry.path, side=side)
        except (UserError, OSError) as error:
            reason = str(error) if isinstance(error, UserError) else error.strerror or str(error)
            self.skipped[name] = reason
            raise UserError(f"{name} cannot be read: {reason}") from error

    def thumbnail(self, name: str, side: int = 160) -> Path:
        """A small WebP picture of an image, made once. It stays inside ``.robustar``."""
        entry = self.entry(name)
        key = hashlib.sha256(f"{name}|{_stamp(entry)}|{side}".encode()).hexdigest()[:32]
        path = self.thumbnails / f"{key}.webp"
        if not path.exists():
            small = Image.fromarray(self.read(name, 2 * side))
            small.thumbnail((side, side), reducing_gap=2.0)
            if max(small.size) < side:  # tiny images would be blurred by the browser
                factor = side // max(small.size)
                small = small.resize((small.width * factor, small.height * factor), Image.Resampling.NEAREST)
            buffer = io.BytesIO()
            small.save(buffer, "WEBP", quality=80, method=0)
            write_whole(path, buffer.getvalue(), durable=False)
        return path

    # Masks.

    def save_mask(self, name: str, mask: Mask) -> None:
        """Accept a mask; an older one is kept in the trash, a proposal for this image is done with.

        Raises:
            UserError: If it is of another size than the image, the image is no training image, or it cannot be
                written.
        """
        self._write(self.accepted, name, mask)
        self.proposed.delete(self.entry(name))

    def load_mask(self, name: str, *, proposal: bool = False) -> Mask | None:
        """The accepted (or proposed) mask of an image, or None; also a stale one."""
        stored = (self.proposed if proposal else self.accepted).load(self.entry(name))
        return None if stored is None else stored.mask

    def delete_mask(self, name: str, *, proposal: bool = False) -> bool:
        """Move a mask to the trash; returns whether there was one."""
        with self._writing:
            return (self.proposed if proposal else self.accepted).delete(self.entry(name))

    def clear_masks(self, *, proposals: bool = False) -> int:
        """Move all accepted masks (or all proposals) to the trash; returns how many."""
        return sum(self.delete_mask(entry.name, proposal=proposals) for entry in self._of("train"))

    def masks(self) -> dict[str, Mask]:
        """The accepted masks that fit their images; stale and damaged ones are left out (``stale``)."""
        return {name: mask for name, mask, reason in self._stored() if mask is not None and not reason}

    def stale(self) -> dict[str, str]:
        """Accepted masks that are not applied: name to reason, e.g. that the image changed since."""
        return {name: reason for name, _, reason in self._stored() if reason}

    def export_masks(self) -> bytes:
        """A ZIP archive of the accepted masks, ``paired/<class>/<image file>.png``."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for entry in self.accepted.having(self._of("train")):
                archive.write(self.accepted.path(entry), f"paired/{entry.label}/{entry.path.name}.png")
        return buffer.getvalue()

    def import_masks(self, archive: bytes, *, white: bool = False) -> Imported:
        """Accept masks from a ZIP archive as ``export_masks`` writes it; nothing else in it is looked at.

        Args:
            archive: The file's content.
            white: The members are pictures as edited for the reference implementation, ``paired/<class>/<image
                file>`` with spurious pixels painted pure white (see ``mask_from_white``).

        Raises:
            UserError: If it is not a ZIP archive or too large.
        """
        if len(archive) > MAX_BYTES:
            raise UserError(f"an archive of {len(archive)} bytes, at most {MAX_BYTES} are read")
        known = masks.by_mask_name(self.entries)
        if white:
            known = {key.removesuffix(".png"): entry for key, entry in known.items()}
        report = Imported()
        try:
            opened = zipfile.ZipFile(io.BytesIO(archive))
        except (zipfile.BadZipFile, ValueError, OSError) as error:
            raise UserError(f"not a ZIP archive: {error}") from error
        for member in opened.infolist():
            entry = known.get(member.filename.removeprefix("paired/"))
            if member.is_dir():
                continue
            try:
                if entry is None:
                    raise UserError("no training image of this name")
                if member.file_size > MAX_BYTES // 8:
                    raise UserError(f"{member.file_size} bytes unpacked, at most {MAX_BYTES // 8} are read")
                self._import(entry, opened.read(member), white)
                report.accepted += 1
            except (UserError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
                report.refused[member.filename[:200]] = str(error)
        return report

    def _import(self, entry: Entry, content: bytes, white: bool) -> None:
        if white:
            mask = masks.mask_from_white(files.read_image(content), self.read(entry.name))
        else:
            mask = files.read_image(content, ("PNG",))[..., 0] >= 128
        self.save_mask(entry.name, mask)

    def _write(self, folder: MaskFolder, name: str, mask: Mask) -> None:
        entry = self.entry(name)
        masks.check_size(mask, self.read(name), name)
        with self._writing:
            try:
                folder.save(entry, StoredMask(np.asarray(mask, bool), self._digest(entry)))
            except OSError as error:
                raise UserError(f"the mask of {name} cannot be written: {error.strerror or error}") from error

    def _stored(self) -> Iterator[tuple[str, Mask | None, str]]:
        """Each accepted mask, with the reason why it does not apply or nothing."""
        for entry in self.accepted.having(self._of("train")):
            try:
                stored = self.accepted.load(entry)
                if stored is not None:
                    masks.check_size(stored.mask, self.read(entry.name), entry.name)
            except UserError as error:
                yield entry.name, None, str(error)
                continue
            if stored is not None:
                fits = stored.image_digest in ("", self._digest(entry))
                yield entry.name, stored.mask, "" if fits else "the image changed after it was annotated"

    def _digest(self, entry: Entry) -> str:
        """SHA-256 of an image file."""
        stamp = _stamp(entry)
        known = self._facts.get("digest", "", entry.name, stamp)
        if known is None:
            known = hashlib.sha256(entry.path.read_bytes()).hexdigest()
            self._facts.put("digest", "", [(entry.name, stamp, known)])
        return str(known)

    def _of(self, split: str) -> list[Entry]:
        return [entry for entry in self.entries.values() if entry.split == split]

    # What the model makes of it.

    def predict(self, name: str) -> dict[str, float]:
        """Probability of each class."""
        stamp, (model, fingerprint) = _stamp(self.entry(name)), self._current
        known = self._facts.get("probs", fingerprint, name, stamp)
        if known is None:
            known = self._probs(model, self._input(name))[0].tolist()
            self._facts.put("probs", fingerprint, [(name, stamp, known)])
        return dict(zip(self.classes, known, strict=True))

    def predict_all(self, split: str, task: Task | None = None) -> None:
        """Predict every image of a split that the current model has not seen; unreadable ones are skipped."""
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        model, fingerprint = self._current
        known = self._facts.all("probs", fingerprint)
        stamps = {entry.name: _stamp(entry) for entry in self._of(split)}
        todo = [name for name, stamp in stamps.items() if known.get(name, ("",))[0] != stamp]
        for start in range(0, len(todo), 32):
            if names := [name for name in todo[start : start + 32] if self._is_readable(name)]:
                probs = self._probs(model, torch.cat([self._input(name) for name in names])).tolist()
                rows = [(name, stamps[name], row) for name, row in zip(names, probs, strict=True)]
                self._facts.put("probs", fingerprint, rows)
            if task:
                task.progress(min(start + 32, len(todo)) / len(todo), f"predicting {split}")

    def predictions(self) -> dict[str, str]:
        """The predicted class of every image that the current model has seen and that did not change since."""
        found = self._facts.all("probs", self._current[1])
        return {
            name: self.classes[int(np.argmax(row))]
            for name, (stamp, row) in found.items()
            if name in self.entries and _stamp(self.entries[name]) == stamp
        }

    def saliency(self, name: str, kind: str = "gradient", label: str | None = None) -> Float[np.ndarray, "h w"]:
        """Saliency of a class (the predicted one) at the image's own size."""
        if label is not None and label not in self.classes:
            raise unknown("class", label, self.classes)
        pixels = self.read(name)
        target = None if label is None else torch.tensor([self.classes.index(label)], device=self.device)
        x = self._input(name)
        with self._holding:
            maps = saliency(self.model, x, target, kind, generator=torch.Generator().manual_seed(0))
        return F.interpolate(maps[:, None], pixels.shape[:2], mode="bilinear")[0, 0].cpu().numpy()

    def influence(self, name: str, top: int = 8, task: Task | None = None) -> Influences:
        """The training images that help and harm the recognition of an image most, through the last layer."""
        entry, (model, fingerprint) = self.entry(name), self._current
        train_names, (phi, probs, targets) = self._train_features(model, fingerprint, task)
        with self._holding:
            features, logits = last_layer(model, self._input(name))
        target = torch.tensor([self.classes.index(entry.label)], device=self.device)
        row = last_layer_influence(phi, probs, targets, features, logits.softmax(1), target)[0]
        order = row.argsort()

        def named(ranks: Tensor) -> list[tuple[str, float]]:
            return [(train_names[i], float(row[i])) for i in ranks.tolist()]

        helpful = named(order[:top][row[order[:top]] < 0])
        harmful = named(order.flip(0)[:top][row[order.flip(0)[:top]] > 0])
        return Influences(helpful, harmful)

    def _train_features(
        self, model: nn.Module, fingerprint: str, task: Task | None
    ) -> tuple[list[str], tuple[Tensor, Tensor, Tensor]]:
        todo = self._of("train")
        key = f"{fingerprint}|{[(e.name, _stamp(e)) for e in todo]}"
        if self._features is None or self._features[0] != key:
            names = [entry.name for entry in todo if self._is_readable(entry.name)]
            rows = []
            for start in range(0, len(names), 32):
                x = torch.cat([self._input(name) for name in names[start : start + 32]])
                with self._holding:
                    rows.append(last_layer(model, x))
                if task:
                    task.progress(min(start + 32, len(names)) / len(names), "features of the training images")
            targets = torch.tensor([self.classes.index(self.entries[name].label) for name in names])
            phi, logits = (torch.cat(parts) for parts in zip(*rows, strict=True))
            self._features = key, (names, (phi, logits.softmax(1), targets.to(self.device)))
        return self._features[1]

    def propose(
        self, proposer: str | Proposer = "saliency", start: int = 0, end: int = -1, task: Task | None = None
    ) -> int:
        """Propose masks for training images that have no accepted one; returns how many.

        Args:
            proposer: One of ``PROPOSERS``, or your own.
            start, end: Positions among the training images, both included; -1 is the last.
            task: Gets the progress, and may cancel.
        """
        todo = self._of("train")
        last = len(todo) - 1 if end == -1 else end
        if not 0 <= start <= last < len(todo):
            raise UserError(f"start and end must be 0 <= start <= end < {len(todo)} (or end -1), got {start} and {end}")
        if isinstance(proposer, str):
            if proposer not in PROPOSERS:
                raise unknown("proposer", proposer, PROPOSERS)
            proposer = PROPOSERS[proposer]
        made = 0
        for index in range(start, last + 1):
            name = todo[index].name
            if todo[index] not in self.accepted and self._is_readable(name):
                with self._holding:
                    mask = proposer(self.read(name), self.model, self.transform)
                self._write(self.proposed, name, mask)
                made += 1
            if task:
                task.progress((index + 1 - start) / (last + 1 - start), name)
        return made

    # Training.

    def paired_data(
        self, fill: str = "random_pure", transform: Callable[[np.ndarray], Tensor] | None = None
    ) -> PairedImages:
        """The readable training images with their partners."""
        accepted = {name for name, _, reason in self._stored() if not reason}
        names = [entry.name for entry in self._of("train") if self._is_readable(entry.name)]
        return PairedImages(
            _OnDemand(names, self.read),
            [self.classes.index(self.entries[name].label) for name in names],
            _OnDemand(names, lambda name: self.load_mask(name) if name in accepted else None),
            transform or self.transform,
            fill,
        )

    def train(
        self,
        task: Task | None = None,
        *,
        epochs: int = 20,
        lr: float = 0.01,
        lam: float = 0.1,
        fill: str = "random_pure",
        batch_size: int = 64,
        transform: Callable[[np.ndarray], Tensor] | None = None,
        seed: int = 0,
    ) -> list[Evaluation]:
        """Continue training on pairs: SGD with momentum 0.9 and weight decay 0.0005, as the reference has it.

        A copy of the model learns. Only when it is finished does it become a checkpoint and take the old one's
        place, which stays on the disk; cancelled, or with a loss that is not finite, nothing changes.

        Args:
            task: Gets the progress, and may cancel.
            epochs, lr, batch_size, seed: Of the training.
            lam: See ``paired_loss``.
            fill: See ``fill_masked``.
            transform: Another for training: one with random crops and flips.

        Returns:
            The old model's evaluation and the new one's.

        Raises:
            UserError: If nothing is annotated or a setting is out of range.
        """
        if not lr > 0:
            raise UserError(f"lr must be positive, got {lr}")
        if not any(not reason for _, _, reason in self._stored()):
            raise UserError("no training image has a mask that applies: accept one first")
        with self._holding:
            model = copy.deepcopy(self.model)
        data = self.paired_data(fill, transform)
        trainer = Trainer(
            epochs,
            interventions=[PairedTraining(lam)],
            batch_size=batch_size,
            seed=seed,
            accelerator=self.device.type,
            progress=task.progress if task else False,
        )
        optimizer = partial(SGD, lr=lr, momentum=0.9, weight_decay=5e-4)
        trainer.fit(model, data, loss=F.cross_entropy, optimizer=optimizer)
        before = self.evaluate(task)
        with self._writing:
            if not self.checkpoints():
                self._save_checkpoint(self.model)
                before = Evaluation(
                    self.checkpoints()[-1], before.accuracy, before.worst_class, before.saliency_in_masks
                )
            name = self._save_checkpoint(model)
        self._install(model, name)
        return [before, self.evaluate(task)]

    def evaluate(self, task: Task | None = None) -> Evaluation:
        """Measure the current model on the test split, and how much it looks at what is masked."""
        self.predict_all("test", task)
        predicted = self.predictions()
        right: dict[str, list[bool]] = {}
        for entry in self._of("test"):
            if entry.name in predicted:
                right.setdefault(entry.label, []).append(predicted[entry.name] == entry.label)
        if not right:
            raise UserError(f"{self.root} holds no test images (test/<class>/<image>) to evaluate on")
        by_class = {label: sum(hits) / len(hits) for label, hits in right.items()}
        worst = min(by_class, key=by_class.__getitem__)
        hits = [hit for row in right.values() for hit in row]
        shares = []
        for name, mask, reason in self._stored():
            if mask is None or reason:
                continue
            maps = torch.from_numpy(self.saliency(name, label=self.entries[name].label))
            shares.append(float(saliency_share(maps[None], torch.from_numpy(mask)[None])))
        share = sum(shares) / len(shares) if shares else None
        return Evaluation(self.checkpoint, sum(hits) / len(hits), (worst, by_class[worst]), share)

    # Checkpoints.

    def checkpoints(self) -> list[str]:
        """Names of the checkpoints, the oldest first."""
        folder = self.root / "checkpoints"
        if not files.is_inside(self.root, folder):
            raise UserError("checkpoints is a link out of the project: nothing is read or written there")
        found = folder.glob("[0-9][0-9][0-9][0-9].pt")
        return sorted(path.stem for path in found if not path.is_symlink())

    def use(self, name: str) -> None:
        """Make a checkpoint the current model.

        Raises:
            UserError: If there is no such checkpoint, or it is of another model.
        """
        if name not in self.checkpoints():
            raise unknown("checkpoint", name, self.checkpoints())
        model = copy.deepcopy(self.model)
        try:
            model.load_state_dict(checkpoint.load(self.root / "checkpoints" / f"{name}.pt")["model"])
        except (KeyError, RuntimeError) as error:
            raise UserError(
                f"checkpoint {name} is of another model than this one: move {self.root / 'checkpoints'} away"
            ) from error
        self._install(model, name)

    def _save_checkpoint(self, model: nn.Module) -> str:
        name = f"{int((self.checkpoints() or ['-1'])[-1]) + 1:04d}"
        path = self.root / "checkpoints" / f"{name}.pt"
        checkpoint.save(path, {"model": model.state_dict(), "saved": time.time()})
        return name

    def _install(self, model: nn.Module, name: str) -> None:
        with self._holding:
            self.model, self.checkpoint = model.eval(), name or "as given"
            self.device = next(model.parameters(), torch.empty(0)).device
            self._current = model, _fingerprint(model, repr(self.transform))

    # The model's input.

    def _input(self, name: str) -> Float[Tensor, "1 channels height width"]:
        return self.transform(self.read(name))[None].to(self.device)

    def _is_readable(self, name: str) -> bool:
        stamp = _stamp(self.entries[name])
        known = self._facts.get("unreadable", "", name, stamp)
        if known is None:
            try:
                self.read(name)
                known = ""
            except UserError:
                known = self.skipped[name]
            self._facts.put("unreadable", "", [(name, stamp, known)])
        if known:
            self.skipped[name] = known
        return not known

    @torch.no_grad()
    def _probs(self, model: nn.Module, x: Tensor) -> Tensor:
        with self._holding:
            logits = model(x)
        if logits.shape != (len(x), len(self.classes)):
            raise UserError(f"the model gives {list(logits.shape)} for {len(x)} images of {len(self.classes)} classes")
        if not logits.isfinite().all():
            raise UserError("the model's output is not finite")
        return logits.softmax(1)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the project against other servers.

        Raises:
            UserError: If another process, or another part of this one, holds it.
        """
        lock = filelock.FileLock(self.root / _HIDDEN / "lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise UserError(f"another server works on {self.root}: stop it first, or open its page") from error
        try:
            yield
        finally:
            lock.release()


class _OnDemand(Sequence[Any]):
    """What ``read`` gives for each name, when it is asked for."""

    def __init__(self, names: list[str], read: Callable[[str], Any]) -> None:
        self.names, self.read = names, read

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Any) -> Any:
        return self.read(self.names[index])


def _stamp(entry: Entry) -> str:
    """Changes whenever the file does."""
    try:
        found = entry.path.stat()
    except OSError:
        return "gone"
    return f"{found.st_mtime_ns}-{found.st_size}"


def _fingerprint(model: nn.Module, transform: str) -> str:
    """Of weights, architecture and input: predictions are valid for one of it."""
    digest = hashlib.sha256(f"{model}|{transform}".encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
