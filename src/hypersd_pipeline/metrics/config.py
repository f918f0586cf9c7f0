"""What the evaluation is told."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from hypersd_pipeline.config import Strict


class FeatureConfig(Strict):
    """Features for the Frechet distance.

    Attributes:
        kind: ``efficientnet_lite0`` (packaged, the metric is ``fd_efficientnet_lite0``) or ``inception`` (the metric is ``fid_inception``).
        resolution: images are resized to this square for EfficientNet; the embedded data's own 64 pixels cost 3.6 ms an image, 224
            twelve times more.
            Distances at different resolutions do not compare. Inception always resizes to 299, as the FID does.
        weights: a local ``pt_inception-2015-12-05-6726825d.pth``; without it torch-fidelity downloads that file once.
    """

    kind: Literal["efficientnet_lite0", "inception"] = "efficientnet_lite0"
    resolution: int = Field(default=64, ge=32)
    weights: Path | None = None


class ClipConfig(Strict):
    """The image-text encoder of the CLIP score.

    Attributes:
        model: ``shipped`` (the packaged dual encoder; its scores do not compare to CLIP's) or an open_clip name, for instance ``ViT-B-32``.
        pretrained: an open_clip tag, for instance ``openai``, or a local weights file; only with an open_clip name.
    """

    model: str = "shipped"
    pretrained: str | None = None


class EvaluationConfig(Strict):
    """The evaluation of teachers and LoRAs; prompts, noise and references are the same for all of them.

    Attributes:
        samples, unseen_samples: pictures per row of the table, at most as many as the splits ``test`` and ``test_unseen`` have.
        student_steps, teacher_steps: the numbers of DDIM steps (trailing grid); the teacher uses ``guidance_scale``, students none.
        bootstrap: resamples for the intervals.
        grid_prompts: rows of the picture grids.
    """

    samples: int = Field(default=300, ge=4)
    unseen_samples: int = Field(default=100, ge=4)
    batch_size: int = Field(default=50, ge=1)
    student_steps: tuple[int, ...] = Field(default=(1, 2, 4, 8), min_length=1)
    teacher_steps: tuple[int, ...] = Field(default=(1, 2, 4, 8, 25), min_length=1)
    guidance_scale: float = Field(default=3.0, ge=1)
    features: FeatureConfig = FeatureConfig()
    clip: ClipConfig = ClipConfig()
    bootstrap: int = Field(default=1000, ge=100)
    grid_prompts: int = Field(default=8, ge=1)
    seed: int = 0
