"""Settings that every claim on labelled images shares, so that people can point it at pictures of their own."""

from typing import Any

from pydantic import Field

from paperworks.bench import Run, Settings
from paperworks.data import LabelledData, load


class ImageSettings(Settings):
    """Which images, and how they are read."""

    data: str = Field("digits", description="images: a name or folder")
    image_size: int | None = Field(None, ge=4, description="side in pixels to scale images to; null: as they are")
    skip_broken: bool = Field(False, description="leave out image files that cannot be read")

    def images(self, run: Run, **selection: Any) -> LabelledData:
        """``paperworks.data.load`` with these settings; ``selection`` is its ``split``, ``limit`` and ``seed``."""
        return load(
            self.data, root=run.data_root, image_size=self.image_size, skip_broken=self.skip_broken, **selection
        )
