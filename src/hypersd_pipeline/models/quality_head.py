"""A small image-quality score: how clean an image looks, not how beautiful it is.

An MLP on the dual encoder's unit image embeddings, trained by the pairwise ranking loss on clean-against-degraded pairs
(``recipes/teacher/encoders.py``). It takes the place of the LAION aesthetic predictor where no CLIP weights are at hand, with the same
form: L2-normalised embedding in, one scalar out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hypersd_pipeline.config import Decay, Strict, Width
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.files import tensors_sha256, write_tensors
from hypersd_pipeline.models.dual_encoder import DualEncoder, check_head, described, dual_encoder_key, read_checked

SHIPPED = Path(__file__).parent.parent / "assets" / "quality_head.safetensors"


class QualityHeadConfig(Strict):
    """Shape of the head: ``embed_dim -> hidden -> hidden -> 1``."""

    embed_dim: Width = 256
    hidden: Width = 128
    dropout: Decay = 0.1


class QualityHead(nn.Module):
    """``image_quality``: unit embeddings ``[b, embed_dim]`` -> scores ``[b]``, of which a higher one is cleaner.

    The output is standardised on clean training images: mean 0, deviation 1. A fresh head is in ``train`` mode, and the loader
    returns it in ``eval``.
    """

    def __init__(self, config: QualityHeadConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.Sequential(
            nn.Linear(config.embed_dim, config.hidden), nn.GELU(), nn.Dropout(config.dropout),
            nn.Linear(config.hidden, config.hidden), nn.GELU(), nn.Dropout(config.dropout),
            nn.Linear(config.hidden, 1),
        )  # fmt: skip

    def forward(self, embeddings: Tensor) -> Tensor:
        # Unit vectors have entries of about 1/sqrt(d): scaled to deviation one, so that the default initialisation fits.
        return self.layers(embeddings * self.config.embed_dim**0.5).squeeze(-1)

    def standardise_(self, mean: float, deviation: float) -> None:
        """Fold ``(score - mean) / deviation`` into the last layer. Ranks do not change."""
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        last.weight.data.div_(deviation)
        last.bias.data.sub_(mean).div_(deviation)


def save_quality_head(head: QualityHead, encoder: DualEncoder, path: Path, recipe: dict[str, Any]) -> None:
    """Write the head with its shape, the hash of the dual encoder it stands on, its own hash and the recipe."""
    tensors = {k: v.detach().float().cpu().contiguous() for k, v in head.state_dict().items()}
    metadata = {
        "config": head.config.model_dump_json(),
        "dual_encoder": tensors_sha256(encoder.trained_tensors()),
        "sha256": tensors_sha256(tensors),
    }
    write_tensors(path, tensors, {**metadata, "recipe": json.dumps(recipe, sort_keys=True)})


def check_quality_head(path: Path = SHIPPED) -> None:
    """Raises UserError for a head that `load_quality_head` would refuse, without building the towers it stands on."""
    check_head(path, dual_encoder_key(), QualityHeadConfig, QualityHead)


def load_quality_head(encoder: DualEncoder, path: Path = SHIPPED) -> QualityHead:
    """The shipped head, frozen, for the encoder that it was trained on.

    Raises:
        UserError: the file is missing or damaged, or belongs to another encoder.
    """
    tensors, metadata = read_checked(path)
    if metadata.get("dual_encoder") != tensors_sha256(encoder.trained_tensors()):
        raise UserError(f"{path}: was trained on another dual encoder; train both with 'kedro run --pipelines teacher'.")
    head = QualityHead(described(path, metadata, "config", QualityHeadConfig))
    head.load_state_dict(tensors)
    return head.to(encoder.device).eval().requires_grad_(False)
