"""Mix-Basic: CK+, MMI and Oulu-CASIA faces with six basic emotions, as the IERN paper merged them.

The three face sets are given out by their owners under their own licences; the split lists come with the
paper's code. This module reads the prepared folder.
"""

import io
import pickle
from pathlib import Path

import torch

from paperworks.data.biased.sourced import SourcedData
from paperworks.data.decode import Decoder
from paperworks.data.labelled import LabelledData
from paperworks.data.root import locate
from paperworks.errors import UserError

EMOTIONS = ("Anger", "Disgust", "Fear", "Happiness", "Sadness", "Surprise")
SOURCES = ("CKPlus", "MMI", "OuluCASIA")
HOW = (
    "Mix-Basic holds faces under licence: ask for CK+, MMI and Oulu-CASIA from their owners, then prepare "
    "the folder with the scripts and split lists of https://github.com/donydchen/causal_emotion."
)


def load_mixbasic(
    path: str | Path = "MixBasic",
    *,
    split: str = "train",
    bias: int = 100,
    fold: int = 1,
    image_size: int = 224,
    root: str | Path | None = None,
) -> SourcedData:
    """Read one fold of Mix-Basic.

    Expects ``path/{CKPlus,MMI,OuluCASIA}/images/*.png``, ``path/emotion_labels.pkl`` (a dictionary such as
    ``{"ckplus_S005_001_00000009": "Disgust"}``) and ``path/{train,test}_ids_bias{90,100}v{1,2,3}.csv``
    (one ``MixBasic/<source>/images/<name>.png`` a line, no header).

    Args:
        path: The folder, as given or inside the data root.
        split: ``"train"`` or ``"test"``.
        bias: 100: every emotion is seen in some of the sources only (the paper's table 2); 90: a tenth is not
            (table 3).
        fold: Fold of the cross-validation.
        image_size: Scale images to cover a square of this side and cut out its centre; three channels.
        root: The data root (see `paperworks.data.data_root`).

    Raises:
        DatasetNotFound: If the folder is not there; the message says how to get it.
        UserError: If a list, label or image is missing or damaged; it is named.
    """
    if split not in ("train", "test") or bias not in (90, 100) or fold not in (1, 2, 3):
        raise UserError(
            f"split must be 'train' or 'test', bias 90 or 100 and fold 1 to 3, got {split!r}, {bias}, {fold}"
        )
    folder = locate(path, root, how=HOW)
    emotions = _read_labels(folder / "emotion_labels.pkl")
    files, targets, sources = [], [], []
    for number, line in enumerate(_read_lines(folder / f"{split}_ids_bias{bias}v{fold}.csv"), 1):
        where = f"{split}_ids_bias{bias}v{fold}.csv, line {number}"
        _, source, *inner = [*Path(line).parts, "", ""]
        if source not in SOURCES:
            raise UserError(f"{where}: {line!r} is not <set>/<source>/images/<name>.png with a source of {SOURCES}")
        key = f"{source.lower()}_{Path(line).stem}"
        if (emotion := emotions.get(key)) not in EMOTIONS:
            raise UserError(f"{where}: emotion_labels.pkl has {emotion!r} for {key!r}, expected one of {EMOTIONS}")
        files.append(folder.joinpath(source, *inner))
        targets.append(EMOTIONS.index(emotion))
        sources.append(SOURCES.index(source))
    name = f"mixbasic/bias{bias}v{fold}/{split}"
    decoder = Decoder(image_size)
    images, _ = decoder.read(lambda row: (files[row], str(files[row])), name, torch.arange(len(files)))
    return SourcedData(LabelledData(images, torch.tensor(targets), EMOTIONS, name), torch.tensor(sources), SOURCES)


class _Plain(pickle.Unpickler):
    """Reads dictionaries and strings; anything that would import or run code is refused."""

    def find_class(self, module: str, name: str) -> None:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _read_labels(file: Path) -> dict[str, str]:
    try:
        labels = _Plain(io.BytesIO(file.read_bytes())).load()
    except (OSError, EOFError, pickle.UnpicklingError, ValueError) as error:
        raise UserError(f"{file} cannot be read as a dictionary of emotions: {error}") from error
    if not isinstance(labels, dict):
        raise UserError(f"{file} must hold a dictionary of emotions, got {type(labels).__name__}")
    return labels


def _read_lines(file: Path) -> list[str]:
    try:
        lines = [line.strip() for line in file.read_text().splitlines()]
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error}. {HOW}") from error
    if not any(lines):
        raise UserError(f"{file} is empty")
    return [line for line in lines if line]
