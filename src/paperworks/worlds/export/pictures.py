"""Pictures on disk."""

from pathlib import Path

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from paperworks.errors import UserError


def save_image(path: Path, image: Float[Tensor, "3 height width"]) -> None:
    """Write RGB in [0, 1]; the suffix says how."""
    Image.fromarray(image.mul(255).round().byte().permute(1, 2, 0).numpy()).save(path)


def new_folder(path: str | Path) -> Path:
    """A folder for an export, which must not hold anything yet."""
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already: exports are written into a new or empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
