"""What the evaluation is told."""

from typing import Literal

from pydantic import Field, field_validator

from hypersd_pipeline.config import Count, Guidance, Seed, Steps, Strict
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.metrics.clip_score import ClipConfig
from hypersd_pipeline.metrics.features import FeatureConfig
from hypersd_pipeline.rewards import RewardConfig

__all__ = ["ClipConfig", "DiversityConfig", "EvaluationConfig", "FeatureConfig"]


class DiversityConfig(Strict):
    """Images of the same prompt, for the metric ``diversity``.

    Attributes:
        prompts: the first ones of the split ``test``. seeds: images of each, one of which is that of the other metrics.
    """

    prompts: int = Field(default=10, ge=2, le=10**6)
    seeds: int = Field(default=2, ge=2, le=1000)


class EvaluationConfig(Strict):
    """The evaluation of teachers and LoRAs. Prompts, noise and references are the same for all of them.

    Attributes:
        samples, unseen_samples: images per row of the table, at most as many as the splits ``test`` and ``test_unseen`` have.
        split: which rows stand for the test images and prompts. ``val`` for choosing settings, so that ``test`` stays unseen until the end.
        student_steps, teacher_steps: the numbers of DDIM steps (trailing grid). The teacher uses ``guidance_scale``, students none.
        mixed_precision: ``bf16`` samples with the network in bf16 by autocast. The VAE and all metrics stay as they are.
        rewards: measured besides, each a metric with the name of its kind. They see images and prompts.
        image_quality: whether the packaged image-quality head is a metric. It knows the embedded data only.
        diversity: how many images of a prompt are compared with each other, and of how many prompts.
        bootstrap: resamples for the intervals.
        grid_prompts: rows of the image grids.
    """

    samples: int = Field(ge=4, le=10**7)
    unseen_samples: int = Field(ge=4, le=10**7)
    split: Literal["test", "val"] = "test"
    batch_size: Count = 50
    student_steps: tuple[Steps, ...] = Field(default=(1, 2, 4, 8), min_length=1)
    teacher_steps: tuple[Steps, ...] = Field(default=(1, 2, 4, 8, 25), min_length=1)
    guidance_scale: Guidance = 3.0
    mixed_precision: Literal["no", "bf16"] = "no"
    features: FeatureConfig = FeatureConfig()
    clip: ClipConfig = ClipConfig()
    rewards: tuple[RewardConfig, ...] = ()
    image_quality: bool = True
    diversity: DiversityConfig = DiversityConfig()
    bootstrap: int = Field(default=1000, ge=100, le=10**6)
    grid_prompts: int = Field(default=8, ge=1, le=1000)
    seed: Seed = 0

    @field_validator("rewards")
    @classmethod
    def _named_once(cls, rewards: tuple[RewardConfig, ...]) -> tuple[RewardConfig, ...]:
        kinds = [reward.kind for reward in rewards]
        if twice := next((kind for kind in kinds if kinds.count(kind) > 1), None):
            raise ValueError(f"rewards has {twice} twice, and a metric is named by its kind; keep one")
        return rewards

    def check_judges(self) -> None:
        """Raises UserError for a judge that is missing or damaged. The packaged ones are looked at too, which every evaluation asks."""
        from hypersd_pipeline.models.quality_head import check_quality_head

        self.features.check()
        self.clip.check()
        check_quality_head()
        for reward in self.rewards:
            try:
                reward.check()
            except UserError as error:
                raise UserError(f"evaluation.rewards: {error}") from error

    def check(self, num_train_timesteps: int) -> None:
        """Raises UserError for a number of steps that the teacher's schedule of so many timesteps has not."""
        for name in ("student_steps", "teacher_steps"):
            most = max(getattr(self, name))
            if most > num_train_timesteps:
                raise UserError(f"evaluation.{name}: {most} steps are more than the teacher's {num_train_timesteps} timesteps; lower it.")
