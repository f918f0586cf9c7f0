"""The training node of a distillation stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from accelerate import Accelerator
from torch import Tensor

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.data.cache import LatentCache
from hypersd_pipeline.models.adapters import AdaptedUNet, checkpoint_gradients
from hypersd_pipeline.models.lora import Contract, LoRA, lora_key
from hypersd_pipeline.models.teacher import Teacher, TeacherConfig, load_teacher
from hypersd_pipeline.pipelines.tscd.config import StageOverrides, TscdDefaults, check_previous
from hypersd_pipeline.training.checkpoints import CheckpointStore, fingerprint
from hypersd_pipeline.training.cost import measure_forward, with_cost
from hypersd_pipeline.training.distillation import DistillationStep, StageConfig, make_adapters, make_adversary
from hypersd_pipeline.training.ema import ema_update
from hypersd_pipeline.training.loop import MetricStream, Stateful, make_accelerator, train


def train_stage(
    latents: LatentCache,
    teacher: TeacherConfig,
    defaults: TscdDefaults,
    stage: StageOverrides,
    checkpoints: CheckpointStore,
    metric_stream: MetricStream,
    previous: LoRA | None = None,
) -> tuple[LoRA, dict[str, float]]:
    """Distil one stage and return its LoRA, the averaged weights, with its sampling contract, and its figures.

    Args:
        latents: the cache; its ``train`` split is used.
        previous: the LoRA of the stage before, from which this one starts.

    Returns:
        The LoRA, and the report: `train`'s figures, and the cost of a step in forward passes (`with_cost`).

    Raises:
        UserError: the grid misses a boundary, ``teacher: previous_stage`` without one, or the cache was made by another teacher.
    """
    return distil(latents, teacher, stage.apply(defaults), checkpoints, metric_stream, previous)


def distil(
    latents: LatentCache,
    teacher: TeacherConfig,
    config: StageConfig,
    checkpoints: CheckpointStore,
    metric_stream: MetricStream,
    previous: LoRA | None = None,
) -> tuple[LoRA, dict[str, float]]:
    """`train_stage`, with the configuration complete."""
    accelerator = make_accelerator(config.loop)
    model = load_teacher(teacher, parts=("unet",), device=accelerator.device)
    check_previous(config, has_previous=previous is not None)
    latents.require_teacher(model)
    adapters = make_adapters(model.unet, config, previous)
    if config.gradient_checkpointing:
        checkpoint_gradients(model.unet)
    adversary = make_adversary(adapters, config, model.schedule, accelerator.device)
    step = DistillationStep(adapters, config, model.schedule, model.prediction_type, accelerator.device, adversary)
    batches = Batches(latents, config, accelerator)
    student, ema = adapters.parameters("student"), adapters.parameters("ema")
    state: dict[str, Stateful] = {"adapters": adapters}
    report = train(
        f"k{config.segments}",
        parameters=student,
        loss_fn=batches.fed_to(step),
        config=config.loop,
        state=state if adversary is None else {**state, "discriminator": adversary},
        key=_key(config, model, latents, previous),
        checkpoints=checkpoints,
        metrics=metric_stream,
        accelerator=accelerator,
        after_update=lambda: ema_update(ema, student, config.ema_decay),
        companions={} if adversary is None else {"discriminator": adversary.optimizer},
        watch=(lambda values, done: None) if adversary is None else adversary.watch,
        constants=_forward_cost(adapters, batches, accelerator),
    )
    return adapters.export("ema", _metadata(config, model, latents)), with_cost(report, config)


class Batches:
    """Draws the stage's batches from the cache, on the stage's device."""

    def __init__(self, latents: LatentCache, config: StageConfig, accelerator: Accelerator) -> None:
        self.data, self.device = latents.split("train"), accelerator.device
        self.size, self.guided = config.loop.batch_size // config.loop.accumulate, config.teacher == "base"

    def fed_to(self, step: DistillationStep) -> Callable[[torch.Generator], tuple[Tensor, dict[str, Tensor]]]:
        """The loss as the loop calls it."""

        def loss_fn(generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
            x0, cond, uncond = self.draw(generator)
            return step(x0, cond, uncond, generator)

        return loss_fn

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Conditioning, Conditioning | None]:
        """``x0``, the conditioning, and the unconditional one where the teacher is guided."""
        picks = torch.randint(len(self.data), (self.size,), generator=generator)
        x0 = self.data.sample(picks, generator).to(self.device)
        cond = self.data.conditioning(picks, generator).to(self.device)
        uncond = self.data.unconditional(self.size, cond.time_ids).to(self.device) if self.guided else None
        return x0, cond, uncond


def _forward_cost(adapters: AdaptedUNet, batches: Batches, accelerator: Accelerator) -> Mapping[str, float]:
    x0, cond, _ = batches.draw(torch.Generator().manual_seed(0))
    return measure_forward(adapters, x0, cond, accelerator.autocast)


def _key(config: StageConfig, model: Teacher, latents: LatentCache, previous: LoRA | None) -> str:
    """What the stage's weights depend on."""
    teacher = [model.content_hash("unet"), model.prediction_type, model.config.dtype, model.scheduler_config()]
    own = config.model_dump(mode="json", exclude={"sampling_eta", "sampling_first"})
    return fingerprint({**own, "loop": config.loop.identity()}, latents.key, teacher, lora_key(previous))


def _metadata(config: StageConfig, model: Teacher, latents: LatentCache) -> dict[str, str]:
    contract = Contract(config.segments, config.sampling_eta, first=config.sampling_first)
    return {
        "method": f"consistency distillation with {config.segments} segments (Hyper-SD, arXiv 2404.13686)",
        "segments": str(config.segments),
        "teacher": model.config.source,
        "teacher_unet_sha256": model.content_hash("unet"),
        "data_key": latents.key,
        "data_rows": latents.parts["rows"],
        "sampling_contract": contract.to_json(model.scheduler_config(), model.prediction_type),
    }
