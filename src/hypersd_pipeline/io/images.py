"""An image as a Kedro dataset."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedro.io import AbstractDataset

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.files import replacing_file

if TYPE_CHECKING:
    from PIL.Image import Image


class ImageDataset(AbstractDataset["Image", "Image"]):
    """A PIL image as a PNG file."""

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self._filepath, self.metadata = Path(filepath), metadata

    def load(self) -> Image:
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(self._filepath, formats=["PNG"]) as image:
                return image.copy()
        except UnidentifiedImageError as error:
            raise UserError(f"{self._filepath} is not an image; delete it and run its pipeline again.") from error

    def save(self, data: Image) -> None:
        with replacing_file(self._filepath) as temporary:
            data.save(temporary, format="PNG")

    def _exists(self) -> bool:
        return self._filepath.exists()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._filepath)}
