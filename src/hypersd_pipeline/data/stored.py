"""The bytes of a manifest's images, whether each one is a file or lies inside a tar."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from PIL import Image

from hypersd_pipeline.data.images import MAX_BYTES, decode_image
from hypersd_pipeline.data.place import Place, spans
from hypersd_pipeline.data.reading import BadFile, read_inside
from hypersd_pipeline.data.rows import Manifest, Row
from hypersd_pipeline.errors import UserError

place_of = lru_cache(maxsize=8)(Place)
CURE = "put the file back, or run data_prep again (kedro run --pipelines data_prep)"


def read_row(manifest: Manifest, row: Row) -> bytes:
    """The bytes of a row's image.

    Raises:
        BadFile: the file, or its tar, cannot be read.
    """
    if row.inside is None:
        return read_inside(manifest.root, row.file, MAX_BYTES)
    return place_of(manifest.address or str(manifest.root)).read(*row.inside)


def read_packed(manifest: Manifest, rows: Sequence[Row]) -> dict[int, bytes]:
    """The images among ``rows`` that lie inside tars, by their position in ``rows``.

    What lies close together is read at once: one request, and not one for each image. An image that cannot be read is missing.
    """
    found: dict[int, bytes] = {}
    inside = {number: row.inside for number, row in enumerate(rows) if row.inside}
    for tar in dict.fromkeys(place[0] for place in inside.values()):
        parts = {number: (start, size) for number, (name, start, size) in inside.items() if name == tar}
        for first, length in spans(list(parts.values())):
            try:
                content = place_of(manifest.address or str(manifest.root)).read(tar, first, length)
            except BadFile:
                continue
            found |= {n: content[at - first : at - first + size] for n, (at, size) in parts.items() if first <= at < first + length}
    return found


def load_row(manifest: Manifest, row: Row) -> Image.Image:
    """The image of a row that was good when it was validated, as `hypersd_pipeline.data.images.decode_image` gives it.

    Raises:
        UserError: it has gone, or is good no longer.
    """
    if not row.width:
        raise UserError("data.source: prompts have no images, and this step needs them; use a source with images for it.")
    try:
        return decode_image(read_row(manifest, row))
    except BadFile as fault:
        raise UserError(f"{manifest.where(row)}: {fault}; {CURE}.") from None
