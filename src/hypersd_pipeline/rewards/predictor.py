"""The linear stack on an embedding that LAION's aesthetic predictor and ImageReward share."""

from __future__ import annotations

from torch import Tensor, nn


class PredictorHead(nn.Module):
    """``width -> 1024 -> 128 -> 64 -> 16 -> 1`` with dropout and no activations; a linear map once in ``eval``.

    Dropout stays in, because the published files number their layers with it: ``layers.0, 2, 4, 6, 7``.
    """

    def __init__(self, width: int = 768) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64), nn.Dropout(0.1),
            nn.Linear(64, 16), nn.Linear(16, 1),
        )  # fmt: skip

    def forward(self, embeddings: Tensor) -> Tensor:
        """``[b, width]`` -> ``[b]``."""
        return self.layers(embeddings).squeeze(-1)
