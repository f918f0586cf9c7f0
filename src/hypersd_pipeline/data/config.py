"""Configuration of the data set and of its caches (``data:`` in ``conf/``)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from hypersd_pipeline.config import Count, Strict
from hypersd_pipeline.data.buckets import Buckets
from hypersd_pipeline.data.place import root_fault
from hypersd_pipeline.data.reading import is_split_name, is_text, leads_out, plain
from hypersd_pipeline.data.twemoji import TwemojiConfig

Dtype = Literal["float32", "float16", "bfloat16"]


def _root(value: str) -> str:
    if not value.strip() or "\0" in value or not is_text(value):
        raise ValueError("is empty or no path; give the folder that holds the images")
    return value


def _inside(value: str) -> str:
    if not value.strip() or leads_out(value) or not is_text(value):
        raise ValueError(f"{value!r} leads out of root or is empty; give a path inside root")
    return value


def _template(value: str) -> str:
    """A path inside root, with ``{split}`` as the only field."""
    try:
        fields = [(name, spec, conversion) for _, name, spec, conversion in Formatter().parse(value) if name is not None]
    except ValueError as error:
        raise ValueError(f"{value!r} has a brace without its partner ({error}); only {{split}} is known") from None
    if any(field != ("split", "", None) for field in fields):
        raise ValueError(f"{value!r} has another field than {{split}}; only {{split}} is known")
    return _inside(value)


def _address(value: str) -> str:
    if fault := root_fault(value):
        raise ValueError(f"{value.partition('://')[0] if '@' in value else value!r} {fault}")
    return _root(value)


Root = Annotated[str, AfterValidator(_root)]
Address = Annotated[str, AfterValidator(_address)]
Inside = Annotated[str, AfterValidator(_inside)]
Template = Annotated[str, AfterValidator(_template)]


class SplitSource(Strict):
    """Where one split comes from. In ``conf/`` a plain string stands for ``{of: <string>}``.

    Attributes:
        of: the split's name in the source: a subfolder, or COCO's name such as ``train2017``; "." is the folder itself.
        share: which part of it, as a half-open interval of a hash of the image's id: an image stays in its split when others are added.
    """

    of: Inside = "."
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


def _check_splits(splits: Mapping[str, SplitSource]) -> Mapping[str, SplitSource]:
    """Names that files can have, and no image in two splits as far as the configuration tells."""
    for name in splits:
        if not is_split_name(name):
            raise ValueError(f"the split's name {name!r} is no name of a file; use letters, digits, _ and -")
    for (one, a), (two, b) in combinations(splits.items(), 2):
        low, high = max(a.share[0], b.share[0]), min(a.share[1], b.share[1])
        if plain("", a.of) == plain("", b.of) and low < high:
            raise ValueError(f"{one} and {two} both take the share [{low}, {high}] of {a.of!r}; give them shares that do not overlap")
    return splits


Splits = Annotated[dict[str, SplitSource], AfterValidator(_check_splits)]


class TwemojiSource(TwemojiConfig):
    """The embedded scenes, written by ``generate_dataset``."""

    kind: Literal["twemoji"]

    def scenes(self) -> TwemojiConfig:
        """What the generator takes."""
        return TwemojiConfig(**self.model_dump(exclude={"kind"}))


class CocoSource(Strict):
    """A folder in COCO format. The defaults are COCO2017's own layout.

    Attributes:
        captions, instances, images: paths inside ``root``, with ``{split}`` for the split's name in the source.
            ``instances: null`` where there are none.
        splits: our name -> the source's.
    """

    kind: Literal["coco"]
    root: Root
    captions: Template = "annotations/captions_{split}.json"
    instances: Template | None = "annotations/instances_{split}.json"
    images: Template = "{split}"
    splits: Splits = Field(
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
        captions: name of the ``.jsonl``. None: ``metadata.jsonl``, or the only one there, or ``.txt`` files.
        splits: our name -> subfolder. None: subfolders named train, val, test if there are any, otherwise a split by hash, 90 : 5 : 5.
    """

    kind: Literal["folder"]
    root: Root
    captions: Inside | None = None
    splits: Splits | None = None


class ShardFilters(Strict):
    """Which samples of shards are used. What is left out is counted by reason in the table of rejected rows.

    Attributes:
        min_side: of the image's shorter side, in pixels.
        aspect: smallest and largest width / height.
        scores: a key of the sample's ``.json`` -> smallest and largest number there, such as ``{aesthetic: [5, null]}``.
            A sample without that number is left out.
    """

    min_side: Count | None = None
    aspect: tuple[float, float] | None = None
    scores: dict[str, tuple[float | None, float | None]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _ordered(self) -> ShardFilters:
        ranges = {
            **({} if self.aspect is None else {"aspect": self.aspect}),
            **{f"scores.{key}": value for key, value in self.scores.items()},
        }
        for name, (low, high) in ranges.items():
            if low is not None and high is not None and not low <= high:
                raise ValueError(f"{name} is [{low}, {high}]; give the smaller number first")
        return self


class ShardsSource(Strict):
    """Tars of samples in webdataset's layout, as img2dataset writes them: ``<key>.jpg``, ``<key>.txt``, ``<key>.json``.

    Attributes:
        root: a folder, or an address that begins with ``s3://``, ``http://`` or ``https://``.
        shards: the tars of the data set below ``root``, with braces (``{00000..00099}.tar``) or ``*``.
        splits: our name -> shards, or a share of them. None: a split of ``shards`` by hash, 90 : 5 : 5.
        caption_key: the key of the ``.json`` that has the caption of a sample without ``.txt``.
        filters: which samples are used.
    """

    kind: Literal["shards"]
    root: Address
    shards: Inside = "*.tar"
    splits: Splits | None = None
    caption_key: str = "caption"
    filters: ShardFilters = ShardFilters()


class PromptsSource(Strict):
    """Captions without images: enough for stored pairs, distribution matching and rewards.

    Attributes:
        file: a ``.txt`` with one caption a line, a ``.jsonl`` or a ``.parquet`` file.
        column: the key or the column that has the caption.
        splits: our name -> a share of the captions. None: a split by hash, 90 : 5 : 5.
    """

    kind: Literal["prompts"]
    file: Root
    column: str = "text"
    splits: Splits | None = None

    @model_validator(mode="after")
    def _shares_only(self) -> PromptsSource:
        if any(split.of != "." for split in (self.splits or {}).values()):
            raise ValueError("splits of prompts are shares of one file; write {train: {share: [0, 0.9]}, test: {share: [0.9, 1]}}")
        return self


Source = TwemojiSource | CocoSource | FolderSource | ShardsSource | PromptsSource


class DataConfig(Strict):
    """The data set and its caches.

    Attributes:
        source: where images and captions come from.
        max_images: per split, chosen by a hash of the id. None for all.
        max_captions: per image, the first ones. None for all.
        dtype: of cached latents. text_dtype: of cached text embeddings.
        shard_rows: rows of a shard at most: what an interrupted run loses at most.
        buckets: aspect-ratio buckets. None: all images are cropped to squares.
        sizes: SDXL's size conditioning of a row. ``default`` is that of an uncropped image of the size that rows are brought to, with
            which users sample. ``image`` is the image's own size and crop, as in SDXL's training.
        batch_size: of the VAE. workers: threads that read images.
    """

    source: Annotated[Source, Field(discriminator="kind")]
    max_images: Count | None = None
    max_captions: Count | None = None
    dtype: Dtype = "float32"
    text_dtype: Dtype = "float32"
    shard_rows: Count = 1024
    buckets: Buckets | None = None
    sizes: Literal["default", "image"] = "default"
    batch_size: Count = 64
    workers: int = Field(default=4, ge=1, le=1024)
