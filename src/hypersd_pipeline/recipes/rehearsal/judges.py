"""Files of random weights in the published layouts of judges, and configurations that read them."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hypersd_pipeline.files import file_sha256
from hypersd_pipeline.metrics.config import ClipConfig, FeatureConfig
from hypersd_pipeline.perception.config import PerceptualModelConfig
from hypersd_pipeline.perception.solo import SoloConfig
from hypersd_pipeline.recipes.blank import blank_clip, pick_score_network, solo_network
from hypersd_pipeline.rewards import RewardConfig
from hypersd_pipeline.rewards.hps_v2 import HpsV2Config
from hypersd_pipeline.rewards.image_reward import _RENAMED, ImageReward, ImageRewardConfig
from hypersd_pipeline.rewards.laion_aesthetic import LaionAestheticConfig
from hypersd_pipeline.rewards.open_clip_model import check_open_clip
from hypersd_pipeline.rewards.pick_score import PickScoreConfig
from hypersd_pipeline.rewards.predictor import PredictorHead

Values = dict[str, Any]
"""A section of the configuration: what overrides the environment's."""


class RandomJudges:
    """Writes each file once into a folder.

    Attributes:
        folder: of the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def reward(self, config: RewardConfig) -> Values:
        """The section that overrides a reward's files. Packaged rewards keep theirs."""
        match config:
            case LaionAestheticConfig():
                width = check_open_clip(config.clip_model, "laion_aesthetic.clip_model")["embed_dim"]
                head = self._once("laion_head.pth", lambda path: torch.save(_tensors(PredictorHead(width)), path))
                clip = self._clip(config.clip_model)
                return {"head": _local(head), "clip": _local(clip)}
            case ImageRewardConfig():
                shape = config.shape
                path = self._once("image_reward.pt", lambda path: torch.save(published_names(_tensors(ImageReward(shape))), path))
                return {"weights": _local(path)}
            case PickScoreConfig():
                folder = self._once("pick_score", lambda path: pick_score_network().save_pretrained(path, max_shard_size="20GB"))
                return {"weights": _local(folder / "model.safetensors")}
            case HpsV2Config():
                return {"weights": _local(self._clip(config.clip_model))}
        return {}

    def perceptual(self, config: PerceptualModelConfig) -> Values:
        """The section that overrides a segmenter's address. One that is a local file keeps it."""
        if not isinstance(config, SoloConfig) or not config.weights.startswith("https://"):
            return {}

        def write(path: Path) -> None:
            net = solo_network(config)
            net.init_weights()  # otherwise its batch norms are as PyTorch leaves them, which random features overflow
            torch.save({"state_dict": _tensors(net)}, path)

        return {"weights": str(self._once("solo.pth", write)), "sha256": None}

    def clip(self, config: ClipConfig) -> Values:
        """The section that overrides the weights of the CLIP score. The packaged encoder has its own."""
        return {} if config.model == "shipped" else {"pretrained": str(self._clip(config.model))}

    def features(self, config: FeatureConfig) -> Values:
        """The section that overrides Inception's file. The packaged EfficientNet has its own."""
        if config.kind != "inception":
            return {}
        path = self._once("inception.pth", lambda path: torch.save(_tensors(_inception()), path))
        return {"weights": str(path), "sha256": file_sha256(path)}

    def _clip(self, name: str) -> Path:
        return self._once(f"{name}.safetensors", lambda path: save_file(_tensors(blank_clip(name, "clip")), path))

    def _once(self, name: str, write: Callable[[Path], None]) -> Path:
        path = self.folder / name
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                write(path)
        return path.absolute()


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in module.state_dict().items()}


def _local(path: Path) -> Values:
    return {"path": str(path), "sha256": None}


def published_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ImageReward's tensors under their published names: the inverse of `from_published`."""
    renamed = {}
    for name, tensor in tensors.items():
        renamed[next(new for pattern, back in _RENAMED if (new := _published(name, pattern, back)) is not None)] = tensor
    return renamed


def _published(name: str, pattern: str, ours: str) -> str | None:
    groups = re.findall(r"\([^()]*\)", pattern)
    number = itertools.count(1)
    back = re.sub(r"\([^()]*\)", lambda _: f"\\{next(number)}", pattern).replace(r"\.", ".")
    found = re.sub(r"\\\\(\d)", lambda match: groups[int(match[1]) - 1], re.escape(ours))
    # the groups stand in the order of the published name in both
    return re.sub(found, back, name) if re.fullmatch(found, name) else None


def _inception() -> nn.Module:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Fresh(FeatureExtractorInceptionV3):  # type: ignore[misc]
        """Its constructor always reads a file."""

        def load_state_dict(self, *_: Any, **__: Any) -> None:
            return None

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    return Fresh("inception-v3-compat", ["2048"], empty)
