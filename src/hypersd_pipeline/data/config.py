"""Configuration of the data set and of its caches (``data:`` in ``conf/``)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from hypersd_pipeline.config import Strict
from hypersd_pipeline.data.twemoji import TwemojiConfig

Dtype = Literal["float32", "float16", "bfloat16"]


class SplitSource(Strict):
    """Where one split comes from; in ``conf/`` a plain string stands for ``{of: <string>}``.

    Attributes:
        of: the split's name in the source: a subfolder, or COCO's name such as ``train2017``; "." is the folder itself.
        share: which part of it, as a half-open interval of a hash of the image's id: a picture stays in its split when others are added.
    """

    of: str = "."
    share: tuple[float, float] = (0.0, 1.0)

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"of": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _ordered(self) -> SplitSource:
        low, high = self.share
        if not 0 <= low < high <= 1:
            raise ValueError(f"share is [{low}, {high}]; give 0 <= low < high <= 1")
        return self


class TwemojiSource(TwemojiConfig):
    """The embedded scenes, written by ``generate_dataset``."""

    kind: Literal["twemoji"]

    def scenes(self) -> TwemojiConfig:
        """What the generator takes."""
        return TwemojiConfig(**self.model_dump(exclude={"kind"}))


class CocoSource(Strict):
    """A folder in COCO format; the defaults are COCO2017's own layout.

    Attributes:
        captions, instances, images: paths inside ``root``, with ``{split}`` for the split's name in the source;
            ``instances: null`` where there are none.
        splits: our name -> the source's.
    """

    kind: Literal["coco"]
    root: str
    captions: str = "annotations/captions_{split}.json"
    instances: str | None = "annotations/instances_{split}.json"
    images: str = "{split}"
    splits: dict[str, SplitSource] = Field(
        default={
            "train": SplitSource(of="train2017"),
            "val": SplitSource(of="val2017", share=(0.0, 0.2)),
            "test": SplitSource(of="val2017", share=(0.2, 1.0)),
        },
        min_length=1,
    )


class FolderSource(Strict):
    """A folder of images with captions in ``.txt`` files beside them (one caption a line), or in a ``.jsonl`` (``file_name``, ``text``).

    Attributes:
        captions: name of the ``.jsonl``; None: ``metadata.jsonl``, or the only one there, or ``.txt`` files.
        splits: our name -> subfolder; None: subfolders named train, val, test if there are any, otherwise a split by hash, 90 : 5 : 5.
    """

    kind: Literal["folder"]
    root: str
    captions: str | None = None
    splits: dict[str, SplitSource] | None = None


Source = TwemojiSource | CocoSource | FolderSource


class DataConfig(Strict):
    """The data set and its caches.

    Attributes:
        source: where pictures and captions come from.
        max_images: per split, chosen by a hash of the id; None for all.
        max_captions: per image, the first ones; None for all.
        dtype: of cached latents; text_dtype: of cached text embeddings.
        shard_rows: rows of a shard: what an interrupted run loses at most.
        batch_size: of the VAE; workers: threads that read images.
    """

    source: Annotated[Source, Field(discriminator="kind")]
    max_images: int | None = Field(default=None, ge=1)
    max_captions: int | None = Field(default=None, ge=1)
    dtype: Dtype = "float32"
    text_dtype: Dtype = "float32"
    shard_rows: int = Field(default=1024, ge=1)
    batch_size: int = Field(default=64, ge=1)
    workers: int = Field(default=4, ge=1)
