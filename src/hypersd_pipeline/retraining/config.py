"""What a scheduled retraining is told (``retrain:`` in ``conf/``)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hypersd_pipeline.config import Count, Seed, Share, Strict
from hypersd_pipeline.experiments.cells import AnyStage
from hypersd_pipeline.training.config import FeedbackConfig

Positive = Annotated[float, Field(ge=0, le=100)]
Stages = Annotated[dict[str, AnyStage], Field(min_length=1)]


class GateConfig(Strict):
    """What a challenger may lose. Each limit is compared with the bad end of the 95 % interval of the paired difference.

    Attributes:
        distance: a part of the champion's distance. A challenger that is not better, but cheaper, may be this much further away.
        scores: in standard deviations of the champion's score over the prompts. For CLIP score, rewards, image quality and diversity.
        masks: of the mask AP, which is in [0, 1]. It has no interval.
        resamples, seed: of the intervals.
    """

    distance: Share = 0.05
    scores: Positive = 0.2
    masks: Share = 0.02
    resamples: int = Field(default=2000, ge=100, le=10**6)
    seed: Seed = 0


class RetrainConfig(Strict):
    """A scheduled retraining.

    Attributes:
        start: ``champion`` trains the stages below ``champion``, the first of which starts from the champion's LoRA. ``scratch`` trains
            those below ``scratch``, as does the first retraining of all.
        champion, scratch: model -> its stage, in order: stages of distillation, feedback, and one-step stages that train a LoRA.
        judges: the held-out reward, the segmenter and the numbers of images of the gate, as feedback learning has them.
        gate: what a challenger may lose.
        min_rows: rows that have to be new, or gone, for a retraining.
        max_drift: the data are also retrained on where a statistic has moved by more standard deviations than this.
        force: retrain although the data did not change.
    """

    start: Literal["champion", "scratch"] = "champion"
    champion: Stages
    scratch: Stages
    judges: FeedbackConfig
    gate: GateConfig = GateConfig()
    min_rows: Count = 1
    max_drift: Positive = 0.25
    force: bool = False
