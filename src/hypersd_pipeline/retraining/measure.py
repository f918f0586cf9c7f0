"""What the gate knows of a LoRA: scores of each prompt, diversity, mask AP, its cost. And whether diffusers can sample with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.evaluation.bench import Bench
from hypersd_pipeline.evaluation.sampling import prompt_noise
from hypersd_pipeline.evaluation.scores import PromptScores
from hypersd_pipeline.evaluation.scoring import Way, diversity, score_samples
from hypersd_pipeline.metrics.config import DiversityConfig, EvaluationConfig
from hypersd_pipeline.models.contract import Contract, sampling_call
from hypersd_pipeline.models.lora import LoRA, merge_lora
from hypersd_pipeline.models.teacher import Teacher, TeacherConfig, load_teacher
from hypersd_pipeline.recipes.feedback import AnnotatedData
from hypersd_pipeline.recipes.tradeoff import noised_image_ap
from hypersd_pipeline.training.config import FeedbackConfig

DIVERSITY = "diversity"


@dataclass(frozen=True)
class Measured:
    """A LoRA, measured at its own number of steps.

    Attributes:
        steps: of its sampling contract. parameters: how many numbers it has.
        scores: of all prompts of ``test``, at ``steps``. diversity: of the first ones, of which several images were made.
        masks: ``mask_ap`` and its companions. Empty where there is no segmenter.
    """

    steps: int
    parameters: int
    scores: PromptScores
    diversity: PromptScores
    masks: Mapping[str, float]


def judged_by(evaluation: EvaluationConfig, judges: FeedbackConfig) -> EvaluationConfig:
    """The evaluation with the held-out reward among its metrics, and as many images of a prompt as the guard of feedback makes."""
    known = any(reward.kind == judges.held_out.kind for reward in evaluation.rewards)
    rewards = evaluation.rewards if known else (*evaluation.rewards, judges.held_out)
    varied = DiversityConfig(prompts=judges.guard.prompts, seeds=judges.guard.variants)
    return evaluation.model_copy(update={"rewards": rewards, "diversity": varied})


@torch.no_grad()
def measure(
    lora: LoRA, source: AnnotatedData, teacher: TeacherConfig, reference: Path, evaluation: EvaluationConfig, judges: FeedbackConfig
) -> Measured:
    """Sample the test prompts with a LoRA at its contract's number of steps, from noise that depends on prompt and seed only.

    A champion is measured on today's test images, whatever data it was trained on.

    Raises:
        UserError: the LoRA has no readable contract, or is another teacher's.
    """
    contract = Contract.of(lora)
    bench = Bench.load(teacher, reference, evaluation)
    model, way, cond = bench.teacher, Way(contract, contract.steps), bench.cond["test"]
    merge_lora(model.backbone.module, lora)
    scored, _ = score_samples(model, bench.scorer, evaluation, bench.splits["test"].prompts, cond, way)
    bench.metrics_of("test", f"{way.steps}_steps", scored)
    scores = bench.prompt_scores([way.steps])
    varied = diversity(model, bench.scorer, evaluation, scored.features, cond, way).double()
    few = PromptScores(scores.prompts[: len(varied)], scores.identity, {way.steps: {DIVERSITY: varied}})
    segmenter = judges.segmenter
    masks = {} if segmenter is None else noised_image_ap(source, bench, segmenter.load(model.device), judges)
    return Measured(way.steps, sum(tensor.numel() for tensor in lora.tensors.values()), scores, few, masks)


def check_weights(lora: LoRA, teacher: TeacherConfig) -> None:
    """Check sizes and contract against the teacher. Raises UserError for what does not fit."""
    model = load_teacher(teacher, parts=("backbone",))
    lora.check({name: tuple(tensor.shape) for name, tensor in model.backbone.module.state_dict().items()})
    Contract.of(lora).check(model.process.num_train_timesteps)
    if (made_for := lora.metadata.get("teacher_unet_sha256")) != model.content_hash("backbone"):
        raise UserError(
            f"LoRA: it was trained on the teacher {str(made_for)[:12]}, and teacher.source is another one; give model_registry in the "
            "catalog another model."
        )


def sample_in_diffusers(folder: Path, teacher: TeacherConfig, contract: Mapping[str, Any], prompt: str) -> None:
    """Load teacher and LoRA as a user does, with diffusers alone, and sample one image.

    Args:
        folder: as `io.lora.LoRADataset` writes it. contract: of its metadata, read.

    Raises:
        UserError: diffusers cannot load or sample it, or the image is empty.
    """
    import diffusers

    model = load_teacher(teacher, parts=())
    cure = "look at the log, and train it again"
    try:
        pipeline = _pipeline(diffusers, model)
        pipeline.load_lora_weights(str(folder))
        pipeline.scheduler = getattr(diffusers, contract["scheduler"]).from_pretrained(str(folder))
        pipeline.set_progress_bar_config(disable=True)
        noise = prompt_noise(range(1), model.latent_shape, seed=0).to(pipeline.device)
        image = pipeline(prompt, latents=noise, output_type="pt", **sampling_call(contract)).images[0].float()
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: diffusers cannot sample with this LoRA ({' '.join(str(error).split())[:200]}); {cure}.") from error
    if not bool(image.isfinite().all()) or float(image.std()) < 1e-3:
        raise UserError(f"{folder}: diffusers makes an empty image with this LoRA; {cure}.")


def _pipeline(diffusers: Any, model: Teacher) -> Any:
    options = {} if model.config.variant is None else {"variant": model.config.variant}
    found = diffusers.DiffusionPipeline.from_pretrained(str(model.folder), **options)
    return found.to("cuda" if torch.cuda.is_available() else "cpu")
