"""Whether a data set changed since it was trained on: keys of rows, counts, and the drift of captions and images."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hypersd_pipeline.data.cache import LatentCache, SplitCache
from hypersd_pipeline.data.rows import Manifest, Row
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.files import write_tensors

FILE = "data.safetensors"
WORDS = "words"
"""The drift of the captions' words: the Jensen-Shannon distance of their shares, in [0, 1]."""
_LOOKED_AT = 2048  # images of the split train whose latents are summed up
_COMMON = 2000  # words


@dataclass(frozen=True)
class DataState:
    """What is remembered of a data set.

    Attributes:
        keys: split -> int64 ``[n]``, ascending: the first eight bytes of each row's sha256, which covers captions and the image's bytes.
        statistics: name -> mean and standard deviation over rows of ``train``: words of a caption, captions, width, height, and the
            mean and the contrast of each latent channel.
        words: the share of each of the commonest words in the captions of ``train``.
    """

    keys: Mapping[str, Tensor]
    statistics: Mapping[str, tuple[float, float]]
    words: Mapping[str, float]

    def counts(self) -> dict[str, int]:
        """Rows of each split."""
        return {split: len(keys) for split, keys in self.keys.items()}


@dataclass(frozen=True)
class Change:
    """What is different from what was trained on last.

    Attributes:
        rows: split -> its number of rows now. added, removed: split -> rows that are new, or gone.
        drift: statistic -> by how many standard deviations its mean moved. ``words`` is a distance of its own.
        reasons: why to retrain, in words. Empty: not to.
    """

    rows: Mapping[str, int]
    added: Mapping[str, int] = field(default_factory=dict)
    removed: Mapping[str, int] = field(default_factory=dict)
    drift: Mapping[str, float] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()

    def summary(self) -> str:
        """In a sentence."""
        words = [f"{what} {sum(found.values())}" for what, found in (("added:", self.added), ("removed:", self.removed))]
        return f"{sum(self.rows.values())} rows, {', '.join(words)}."

    def numbers(self) -> dict[str, object]:
        """For a report."""
        return {name: value for name, value in asdict(self).items() if name != "reasons"}


def state_of(manifest: Manifest, latents: LatentCache) -> DataState:
    """The state of a data set. A sample of the cached latents stands for the images, so no image is read again."""
    keys = {split: _keys(rows) for split, rows in manifest.splits.items()}
    train = manifest.splits["train"]
    counted: Counter[str] = Counter()
    columns: dict[str, list[float]] = {"caption_words": [], "captions": [], "width": [], "height": []}
    for row in train:
        words = [word for caption in row.captions for word in re.findall(r"\w+", caption.lower())]
        counted.update(words)
        for name, value in zip(columns, (len(words) / len(row.captions), len(row.captions), row.width, row.height), strict=True):
            columns[name].append(value)
    statistics = {name: _moments(torch.tensor(values, dtype=torch.float64)) for name, values in columns.items()}
    total = counted.total() or 1
    shares = {word: n / total for word, n in sorted(counted.items(), key=lambda item: (-item[1], item[0]))[:_COMMON]}
    return DataState(keys, {**statistics, **_latent_statistics(latents.split("train"))}, shares)


def _keys(rows: Iterable[Row]) -> Tensor:
    numbers = [int.from_bytes(bytes.fromhex(row.digest()[:16]), "big", signed=True) for row in rows]
    return torch.tensor(sorted(numbers), dtype=torch.int64)


def _moments(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std(unbiased=False))


def _latent_statistics(split: SplitCache) -> dict[str, tuple[float, float]]:
    if not split.has_images:
        return {}
    picks = torch.linspace(0, len(split) - 1, min(len(split), _LOOKED_AT)).long()
    x = torch.cat([split.sample(some, None).double() for some in picks.split(256)])
    means, contrasts = x.mean((2, 3)), x.std((2, 3))
    found: dict[str, tuple[float, float]] = {}
    for c in range(x.shape[1]):
        found |= {f"latent_{c}_mean": _moments(means[:, c]), f"latent_{c}_contrast": _moments(contrasts[:, c])}
    return found


def change_of(before: DataState | None, now: DataState, *, min_rows: int, max_drift: float, force: bool = False) -> Change:
    """What changed from ``before``, the state that was trained on last. None: there was none.

    Args:
        min_rows, max_drift, force: see `retraining.config.RetrainConfig`.
    """
    if before is None:
        return Change(now.counts(), added=now.counts(), reasons=("There is no version that was judged before.",))
    added, removed = _missing(now.keys, before.keys), _missing(before.keys, now.keys)
    drift = {name: _moved(before.statistics[name], value) for name, value in now.statistics.items() if name in before.statistics}
    drift[WORDS] = _distance(before.words, now.words)
    reasons = []
    if (rows := sum(added.values()) + sum(removed.values())) >= min_rows:
        reasons.append(f"{sum(added.values())} rows are new and {sum(removed.values())} are gone.")
    if rows and (most := max(drift, key=lambda name: drift[name])) and drift[most] > max_drift:
        reasons.append(f"{most} drifted by {drift[most]:.2f}, more than {max_drift:g}.")
    if force and not reasons:
        reasons.append("retrain.force asks for it.")
    return Change(now.counts(), added, removed, drift, tuple(reasons))


def _missing(keys: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, int]:
    """Rows of each split of ``keys`` that ``other`` has not in that split. Equal rows count as often as they occur."""
    found = {}
    for split, values in keys.items():
        theirs = Counter(other[split].tolist()) if split in other else Counter()
        found[split] = (Counter(values.tolist()) - theirs).total()
    return found


def _moved(before: tuple[float, float], now: tuple[float, float]) -> float:
    """By how many of the former standard deviations a mean moved. Where all values were one, any move counts as one deviation."""
    moved = abs(now[0] - before[0])
    return moved / before[1] if before[1] > 1e-9 else float(moved > 1e-9)


def _distance(one: Mapping[str, float], two: Mapping[str, float]) -> float:
    names = sorted({*one, *two})
    p, q = (torch.tensor([shares.get(name, 0.0) for name in names], dtype=torch.float64) for shares in (one, two))
    mean = (p + q) / 2
    divergence = sum(float(torch.special.xlogy(x, x / mean.clamp(min=1e-300)).sum()) for x in (p, q)) / 2
    return float(max(0.0, divergence / torch.log(torch.tensor(2.0)).item()) ** 0.5)


def write_state(folder: Path, state: DataState) -> None:
    """Write ``data.safetensors``."""
    content = {"statistics": {name: list(value) for name, value in state.statistics.items()}, "words": dict(state.words)}
    write_tensors(folder / FILE, dict(state.keys), {"state": json.dumps(content, ensure_ascii=False)})


def read_state(folder: Path) -> DataState:
    """What `write_state` wrote.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = folder / FILE
    try:
        with safe_open(path, framework="pt") as file:
            content = json.loads((file.metadata() or {})["state"])
            keys = {name: file.get_tensor(name) for name in file.keys()}
        statistics = {str(name): _pair(value) for name, value in content["statistics"].items()}
        return DataState(keys, statistics, {str(word): float(share) for word, share in content["words"].items()})
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: what the last version was trained on cannot be read ({error}); set retrain.force to train anew."
        ) from None


def _pair(value: Sequence[float]) -> tuple[float, float]:
    mean, deviation = value
    return float(mean), float(deviation)
