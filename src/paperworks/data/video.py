"""Clips from videos: files or folders of frames, in class folders or named by the official lists."""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from paperworks.data.indexed import choose_split, split_name
from paperworks.data.labelled import LabelledData
from paperworks.data.labels import check_labels
from paperworks.errors import MissingExtra, UserError, nearest, unknown

VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}
FRAME_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}
_SPLITS = {"train", "val", "valid", "validation", "test"}
_TRUNCATED = 0.9  # of the promised frames; old AVI encoders promise a few that do not come


@dataclass(frozen=True)
class Sampling:
    """How a clip is cut from a video.

    Attributes:
        frames: Frames of a clip, T.
        stride: Video frames from one to the next. A video shorter than the clip is sampled evenly from end to end.
            8 frames with stride 8 are the usual 64-frame window of "8x8" networks.
        size: Height and width in pixels: frames are scaled to cover this square, and its centre is cut out.
        grayscale: One channel (ITU-R 601 luma) instead of three.
        clips_per_video: Clips at evenly spread places of each video; one lies in its middle.

    Raises:
        UserError: If a number is less than 1.
    """

    frames: int = 8
    stride: int = 8
    size: int = 112
    grayscale: bool = False
    clips_per_video: int = 1

    def __post_init__(self) -> None:
        for name in ("frames", "stride", "size", "clips_per_video"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")

    def positions(self, length: int, clip: int) -> list[int]:
        """The frames of clip number ``clip`` of a video of ``length`` frames."""
        span = (self.frames - 1) * self.stride
        if length - 1 < span:
            return [round(k * (length - 1) / (self.frames - 1)) for k in range(self.frames)]
        start = round((clip + 0.5) / self.clips_per_video * (length - 1 - span))
        return list(range(start, start + span + 1, self.stride))

    def pixels(self, image: Image.Image) -> Float32[Tensor, "channels size size"]:
        """One frame as a tensor in [0, 1]."""
        image = image.convert("L" if self.grayscale else "RGB")
        image = ImageOps.fit(image, (self.size, self.size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.atleast_3d(np.asarray(image)).copy()).permute(2, 0, 1).float().div_(255)


@dataclass(frozen=True, eq=False)
class VideoSet(Dataset):
    """Labelled clips that are decoded when they are asked for: ``(clip [C, T, H, W] in [0, 1], class index)``.

    Attributes:
        videos: Video files, or folders of frames in natural order (``2.jpg`` before ``10.jpg``).
        labels: Class index of each video.
        classes: The name of each class.
        name: Which set this is, for reports.
        sampling: How clips are cut out.

    Raises:
        UserError: If labels and videos do not fit, or (when a clip is read) a video is broken; it is named.
    """

    videos: tuple[Path, ...]
    labels: Int64[Tensor, " videos"]
    classes: tuple[str, ...]
    name: str
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if len(self.videos) != len(self.labels) or not self.videos:
            raise UserError(f"{self.name}: got {len(self.videos)} videos and {len(self.labels)} labels")
        check_labels(self.labels, len(self.classes), f"{self.name}: labels")

    def __len__(self) -> int:
        return len(self.videos) * self.sampling.clips_per_video

    def __getitem__(self, index: int) -> tuple[Float32[Tensor, "channels frames size size"], int]:
        video, clip = divmod(index, self.sampling.clips_per_video)
        return read_clip(self.videos[video], self.sampling, clip), int(self.labels[video])

    @property
    def targets(self) -> Int64[Tensor, " n"]:
        """Class index of each clip."""
        return self.labels.repeat_interleave(self.sampling.clips_per_video)

    def subset(self, videos: Int64[Tensor, " m"] | Bool[Tensor, " n"] | Sequence[int]) -> "VideoSet":
        """Return a set of some of the videos (all clips of each, so that no video is in two parts of a split)."""
        rows = torch.as_tensor(videos)
        rows = rows.nonzero().flatten() if rows.dtype == torch.bool else rows.long()
        return replace(self, videos=tuple(self.videos[row] for row in rows), labels=self.labels[rows])

    def unlabelled(self) -> "ClipsAlone":
        """Return the same clips without labels."""
        return ClipsAlone(self.videos, self.sampling)

    def load(self) -> LabelledData:
        """Decode all clips into memory: ``[n, C, T, H, W]``."""
        clips = torch.stack([clip for clip, _ in (self[index] for index in range(len(self)))])
        return LabelledData(clips, self.targets, self.classes, self.name)


@dataclass(frozen=True, eq=False)
class ClipsAlone(Dataset):
    """Clips ``[C, T, H, W]`` of videos whose labels are unknown, or hidden."""

    videos: tuple[Path, ...]
    sampling: Sampling = field(default_factory=Sampling)

    def __len__(self) -> int:
        return len(self.videos) * self.sampling.clips_per_video

    def __getitem__(self, index: int) -> Float32[Tensor, "channels frames size size"]:
        video, clip = divmod(index, self.sampling.clips_per_video)
        return read_clip(self.videos[video], self.sampling, clip)


def read_clip(video: Path, sampling: Sampling, clip: int = 0) -> Float32[Tensor, "channels frames size size"]:
    """Decode one clip of a video file (with PyAV) or a folder of frames.

    Raises:
        UserError: If the video is broken, truncated or empty; the message names the file.
        MissingExtra: If it is a video file and PyAV is not installed.
    """
    read = _from_folder if video.is_dir() else _from_file
    return torch.stack(read(video, sampling, clip), dim=1)


def _from_folder(folder: Path, sampling: Sampling, clip: int) -> list[Tensor]:
    files = _frames(folder)
    if not files:
        raise UserError(f"{folder} holds no frames ({', '.join(sorted(FRAME_SUFFIXES))})")
    frames = []
    for position in sampling.positions(len(files), clip):
        try:
            with Image.open(files[position]) as image:
                frames.append(sampling.pixels(image))
        # Pillow's formats raise each of these on damaged files.
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            raise UserError(f"{files[position]} cannot be read as a frame ({type(error).__name__})") from error
    return frames


def _from_file(file: Path, sampling: Sampling, clip: int) -> list[Tensor]:
    with _opened(file) as (container, stream):
        length = sum(1 for packet in container.demux(stream) if packet.size)
        if length < _TRUNCATED * stream.frames:
            raise UserError(f"{file} is truncated: it holds {length} of {stream.frames} frames")
        while length:
            wanted = sampling.positions(length, clip)
            container.seek(0)
            frames, seen = {}, 0
            for seen, frame in enumerate(container.decode(stream), 1):
                if seen - 1 in wanted:
                    frames[seen - 1] = sampling.pixels(frame.to_image())
                if seen > wanted[-1]:
                    return [frames[position] for position in wanted]
            length = seen if seen < length else 0  # some packets held no frame: the video is as much shorter
    raise UserError(f"{file} holds no frames")


@contextmanager
def _opened(file: Path) -> Iterator[tuple[Any, Any]]:
    try:
        import av
    except ImportError as error:
        raise MissingExtra("PyAV (av)", "video", f"reading video files such as {file.name}") from error
    try:
        with av.open(str(file)) as container:
            if not container.streams.video:
                raise UserError(f"{file} holds no video")
            yield container, container.streams.video[0]
    except av.FFmpegError as error:
        raise UserError(f"{file} cannot be read as a video ({error.strerror})") from error


def video_folder(path: Path, split: str = "all", sampling: Sampling | None = None) -> VideoSet:
    """Index ``<class>/<video>``, or ``<split>/<class>/<video>`` if all sub-folders are named as splits.

    Args:
        path: The folder. A video is a file, or a folder of frames.
        split: One of the splits, or ``"all"``.
        sampling: How clips are cut out.

    Raises:
        UserError: If there are no class folders, or one holds no videos.
    """
    if not path.is_dir():
        raise UserError(f"{path} is no folder; expected one with {path.name}/<class>/<video file or folder of frames>")
    parts = {folder.name: folder for folder in _subfolders(path)}
    if not parts or not parts.keys() <= _SPLITS:
        parts = {"all": path}
    # One numbering for all splits, even where a class is in one of them only.
    classes = sorted({folder.name for part in parts.values() for folder in _subfolders(part)})
    if not classes:
        raise UserError(f"{path} holds no class folders; expected {path.name}/<class>/<video file or folder of frames>")
    videos: list[Path] = []
    labels: list[int] = []
    for part in choose_split(path.name, split, parts):
        for folder in _subfolders(part):
            found = sorted((entry for entry in folder.iterdir() if _is_video(entry)), key=_natural)
            if not found:
                raise UserError(
                    f"class folder {folder} holds no videos: neither files ({', '.join(sorted(VIDEO_SUFFIXES))}) "
                    "nor folders of frames"
                )
            videos += found
            labels += [classes.index(folder.name)] * len(found)
    name = split_name(path.name, split)
    return VideoSet(tuple(videos), torch.tensor(labels), tuple(classes), name, sampling or Sampling())


def video_list(
    listing: Path, root: Path, classes: Sequence[str], sampling: Sampling | None = None, *, first_label: int = 0
) -> VideoSet:
    """Index the videos of a text list with lines ``path`` or ``path label``.

    The label of a line without one is that of the video's folder, as in ``Archery/v_Archery_g01_c01.avi``.

    Args:
        listing: The list.
        root: Folder that its paths are relative to.
        classes: The class names, in the order of the labels.
        sampling: How clips are cut out.
        first_label: Number of the first class: 0, or 1 in the lists of UCF-101.

    Raises:
        UserError: If a line names no video, an unknown class, or a label out of range; it is named.
    """
    videos: list[Path] = []
    labels: list[int] = []
    for number, line in enumerate(_read(listing).splitlines(), 1):
        if not (entry := line.strip()):
            continue
        where = f"{listing}, line {number}"
        head, _, tail = entry.rpartition(" ")
        if head and tail.isdecimal():
            entry, label = head, int(tail) - first_label
            if not 0 <= label < len(classes):
                expected = f"{first_label} to {first_label + len(classes) - 1}"
                raise UserError(f"{where}: label {tail} is out of range, expected {expected}")
        elif (folder := Path(entry).parent.name) in classes:
            label = list(classes).index(folder)
        else:
            raise UserError(f"{where}: {folder!r} is none of the classes.{nearest(folder, classes)}")
        if not (video := root / entry).exists():
            raise UserError(f"{where}: there is no {video}")
        videos.append(video)
        labels.append(label)
    if not videos:
        raise UserError(f"{listing} names no videos")
    return VideoSet(tuple(videos), torch.tensor(labels), tuple(classes), listing.stem, sampling or Sampling())


def ucf101(root: Path, lists: Path, split: str = "train", fold: int = 1, sampling: Sampling | None = None) -> VideoSet:
    """Index UCF-101 (Soomro et al. 2012) by its official lists.

    Args:
        root: The folder ``UCF-101`` with ``<class>/v_<class>_gXX_cYY.avi``.
        lists: The folder ``ucfTrainTestlist`` with ``classInd.txt``, ``trainlist01.txt`` …
        split: ``"train"`` or ``"test"``.
        fold: 1, 2 or 3.
        sampling: How clips are cut out.

    Raises:
        UserError: If a list is missing or does not fit the videos.
    """
    if split not in ("train", "test"):
        raise unknown("split", split, ("train", "test"))
    if fold not in (1, 2, 3):
        raise UserError(f"fold must be 1, 2 or 3, got {fold}")
    index = [line.split() for line in _read(lists / "classInd.txt").splitlines() if line.strip()]
    if [number for number, *_ in index] != [str(k) for k in range(1, len(index) + 1)]:
        raise UserError(f"{lists / 'classInd.txt'} must number the classes 1, 2, …, one a line")
    classes = [name for _, name in index]
    return video_list(lists / f"{split}list{fold:02d}.txt", root, classes, sampling, first_label=1)


def kinetics(root: Path, table: Path, sampling: Sampling | None = None) -> VideoSet:
    """Index Kinetics by an official CSV with the columns label, youtube_id, time_start, time_end.

    Videos are ``<youtube_id>_<start>_<end>.<suffix>`` with six digits for a time, in ``root`` or in a folder of the
    class. Many have vanished since: those that are missing are counted in a warning.

    Raises:
        UserError: If the table lacks a column or none of its videos is there.
    """
    import pandas as pd

    rows = pd.read_csv(table)
    for column in ("label", "youtube_id", "time_start", "time_end"):
        if column not in rows:
            raise UserError(f"{table} has no column {column!r}.{nearest(column, rows.columns)}")
    classes = tuple(sorted(rows["label"].unique()))
    there = {entry.stem: entry for entry in [*root.glob("*"), *root.glob("*/*")] if entry.suffix in VIDEO_SUFFIXES}
    videos: list[Path] = []
    labels: list[int] = []
    for row in rows.itertuples():
        stem = f"{row.youtube_id}_{int(row.time_start):06d}_{int(row.time_end):06d}"  # type: ignore[arg-type]
        if stem in there:
            videos.append(there[stem])
            labels.append(classes.index(row.label))
    if not videos:
        raise UserError(f"{root} holds none of the {len(rows)} videos of {table}, such as {stem}.mp4")
    if (missing := len(rows) - len(videos)) > 0:
        warnings.warn(f"{root} lacks {missing} of the {len(rows)} videos of {table}", stacklevel=2)
    return VideoSet(tuple(videos), torch.tensor(labels), classes, table.stem, sampling or Sampling())


def _read(listing: Path) -> str:
    try:
        return listing.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the list {listing}: {error}") from error


def _subfolders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _is_video(entry: Path) -> bool:
    if entry.name.startswith("."):
        return False
    return bool(_frames(entry)) if entry.is_dir() else entry.suffix.lower() in VIDEO_SUFFIXES


def _frames(folder: Path) -> list[Path]:
    return sorted((file for file in folder.iterdir() if file.suffix.lower() in FRAME_SUFFIXES), key=_natural)


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sort key in which numbers count as numbers."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", path.name)]
