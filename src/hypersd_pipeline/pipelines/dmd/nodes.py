"""Nodes of the one-step stages: what they start from, the unified LoRA, the dedicated UNet."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hypersd_pipeline.data.cache import LatentCache
from hypersd_pipeline.diffusion.sampling import Denoiser
from hypersd_pipeline.models.adapters import AdaptedUNet, checkpoint_gradients
from hypersd_pipeline.models.lora import Contract, LoRA, combine, lora_key, merge_lora
from hypersd_pipeline.models.one_step import write_unet
from hypersd_pipeline.models.teacher import Teacher, TeacherConfig, denoiser_of, load_teacher
from hypersd_pipeline.pipelines.dmd.config import OneStepConfig
from hypersd_pipeline.pipelines.dmd.pairs import Pairs, pairs_key, read_pairs
from hypersd_pipeline.pipelines.tscd.config import StageOverrides, TscdDefaults
from hypersd_pipeline.pipelines.tscd.nodes import Batches
from hypersd_pipeline.rewards import load_reward
from hypersd_pipeline.training.adversary import Adversary
from hypersd_pipeline.training.checkpoints import CheckpointStore, content_hashes, fingerprint
from hypersd_pipeline.training.cost import measure_forward, with_matching_cost
from hypersd_pipeline.training.distillation import DistillationStep, StageConfig, changed
from hypersd_pipeline.training.distribution import CRITIC, Batch, Critic, MatchingStep
from hypersd_pipeline.training.ema import ema_update
from hypersd_pipeline.training.feedback import RewardTerm, decoded_one_by_one
from hypersd_pipeline.training.loop import MetricStream, Stateful, make_accelerator, train

Loss = tuple[Tensor, dict[str, Tensor]]


def choose_start(lora: LoRA, feedback_lora: LoRA, stage: OneStepConfig) -> LoRA:
    """The LoRA that the one-step stages start from: the distilled one plus ``feedback_weight`` times the feedback LoRA."""
    return combine(lora, feedback_lora, stage.feedback_weight) if stage.feedback_weight else lora


def train_unified(
    latents: LatentCache,
    teacher: TeacherConfig,
    defaults: TscdDefaults,
    consistency: StageOverrides,
    stage: OneStepConfig,
    pairs: Path,
    checkpoints: CheckpointStore,
    metric_stream: MetricStream,
    start: LoRA | None = None,
) -> tuple[LoRA, dict[str, float]]:
    """Train the unified LoRA: one step by distribution matching, the others kept by the TSCD loss with one segment.

    Teacher, student, average and critic are one UNet and three adapters.

    Args:
        defaults, consistency: of the TSCD stage with one segment, whose loss is mixed in.
        pairs: see `make_pairs`. start: see `choose_start`.

    Returns:
        The averaged LoRA with its sampling contract, and the loop's report with the cost of a step in forward passes.

    Raises:
        UserError: weights of a reward are missing, the pairs or the cache were made with something else, or ``start`` has other modules.
    """
    return unify(latents, teacher, stage, consistency.apply(defaults), pairs, checkpoints, metric_stream, start)


def unify(
    latents: LatentCache,
    teacher: TeacherConfig,
    stage: OneStepConfig,
    consistency: StageConfig | None,
    pairs: Path,
    checkpoints: CheckpointStore,
    metric_stream: MetricStream,
    start: LoRA | None = None,
) -> tuple[LoRA, dict[str, float]]:
    """`train_unified`, with the configuration complete; ``consistency`` may be None where its weight is 0."""
    accelerator = make_accelerator(stage.loop)
    model = _load(teacher, stage, latents, accelerator)
    adapters = AdaptedUNet(
        model.unet,
        rank=start.rank if start else stage.lora.rank,
        target_modules=tuple(start.modules()) if start else stage.lora.target_modules,
        trainable=("student", CRITIC),
        start=start,
        fresh_names=(CRITIC,),
        seed=stage.loop.seed,
    )
    if stage.gradient_checkpointing:
        checkpoint_gradients(model.unet)
    student = adapters.parameters("student")
    setup = _Setup(stage, model, adapters, latents, accelerator, _pairs(stage, pairs, latents, model, start))
    step = setup.step(adapters.denoiser("student"), ready=lambda: adapters.use("student"))
    mixed = _mixed(consistency, stage)
    kept = None if mixed is None else _consistency(mixed, adapters, latents, model, accelerator)
    report = _train(
        setup, "unified", student, setup.fed_to(step, kept), {"adapters": adapters}, latents, start, checkpoints, metric_stream,
        after_update=lambda: ema_update(adapters.parameters("ema"), student, stage.ema_decay), mixed=mixed,
    )  # fmt: skip
    last, told = model.schedule.num_train_timesteps - 1, stage.matching.time_input
    contract = Contract(1, stage.sampling_eta, "tcd", first=None if told == last else told)
    metadata = {**_metadata(model, latents), "sampling_contract": contract.to_json(model.scheduler_config(), model.prediction_type)}
    return adapters.export("ema", metadata), report


def train_unet(
    latents: LatentCache,
    teacher: TeacherConfig,
    stage: OneStepConfig,
    pairs: Path,
    checkpoints: CheckpointStore,
    metric_stream: MetricStream,
    start: LoRA | None = None,
) -> tuple[Callable[[Path], None], dict[str, float]]:
    """Train every weight of a UNet for one step from ``matching.time_input``; teacher and critic are a second, frozen UNet and an adapter.

    Returns:
        A writer of the UNet's folder for diffusers, and the report.

    Raises:
        UserError: as `train_unified`.
    """
    accelerator = make_accelerator(stage.loop)
    model = _load(teacher, stage, latents, accelerator)
    student = copy.deepcopy(model.unet).float().requires_grad_(True)  # in bf16 a LoRA, or an update of 1e-6, would round away
    if start is not None:
        merge_lora(student, start)
    average = copy.deepcopy(student).requires_grad_(False)
    if stage.ema_on_cpu:
        average.cpu()
    adapters = AdaptedUNet(
        model.unet,
        rank=stage.lora.rank,
        target_modules=stage.lora.target_modules,
        names=(CRITIC,),
        trainable=(CRITIC,),
        seed=stage.loop.seed,
    )
    for unet in (student, model.unet) if stage.gradient_checkpointing else ():
        checkpoint_gradients(unet)
    setup = _Setup(stage, model, adapters, latents, accelerator, _pairs(stage, pairs, latents, model, start))
    step = setup.step(denoiser_of(student))
    sources, targets = list(student.parameters()), list(average.parameters())
    report = _train(
        setup, "one-step UNet", sources, setup.fed_to(step), {"adapters": adapters, "student": student, "average": average}, latents, start,
        checkpoints, metric_stream, after_update=lambda: ema_update(targets, sources, stage.ema_decay),
    )  # fmt: skip
    contract = json.loads(Contract(1, only=stage.matching.time_input).to_json(model.scheduler_config(), model.prediction_type))
    return functools.partial(write_unet, unet=average, contract=contract, metadata=_metadata(model, latents)), report


class _Setup:
    """What both stages have in common: critic, adversary, rewards, and how batches are drawn."""

    def __init__(
        self,
        stage: OneStepConfig,
        model: Teacher,
        adapters: AdaptedUNet,
        latents: LatentCache,
        accelerator: Accelerator,
        pairs: Pairs | None,
    ) -> None:
        self.stage, self.model, self.adapters, self.accelerator, self.pairs = stage, model, adapters, accelerator, pairs
        self.data, self.size = latents.split("train"), stage.loop.batch_size // stage.loop.accumulate
        self.critic = (
            Critic(adapters, stage.matching.critic, model.schedule, model.prediction_type, stage.loop.accumulate)
            if stage.matching.matching_weight
            else None
        )
        self.adversary: Adversary | None = None
        if stage.adversarial.weight:
            self.adversary = Adversary(
                adapters, stage.adversarial, model.schedule, segments=1, passes=stage.loop.accumulate, seed=stage.loop.seed,
                device=accelerator.device,
            )  # fmt: skip

    def step(self, student: Denoiser, ready: Callable[[], None] = lambda: None) -> MatchingStep:
        """The step that trains ``student``."""
        model, stage = self.model, self.stage
        return MatchingStep(
            student,
            self.adapters.denoiser(None),
            stage.matching,
            model.schedule,
            model.prediction_type,
            ready=ready,
            critic=self.critic,
            adversary=self.adversary,
            rewards=[RewardTerm(load_reward(term.reward, model.device), term.alpha, term.weight) for term in stage.rewards],
            decode=self._decode,
        )

    def _decode(self, latents: Tensor) -> Tensor:
        decode = functools.partial(self.model.decode, clip=False)
        return decoded_one_by_one(decode, latents) if self.stage.decode_checkpointing else decode(latents)

    def fed_to(self, step: MatchingStep, kept: Callable[[torch.Generator], Loss] | None = None) -> Callable[[torch.Generator], Loss]:
        """The loss as the loop calls it; ``kept`` is the consistency loss that is mixed in."""

        def loss_fn(generator: torch.Generator) -> Loss:
            extra, scalars = kept(generator) if kept else (0.0, {})
            loss, own = step(self.draw(generator), generator)
            return loss + self.stage.matching.consistency_weight * extra, {**scalars, **own}

        return loss_fn

    def draw(self, generator: torch.Generator) -> Batch:
        """Noise with prompts, from the pairs where there are any, and what else the terms need."""
        device = self.accelerator.device
        if self.pairs is None:
            rows = torch.randint(len(self.data), (self.size,), generator=generator)
            z, target = torch.randn(self.size, *self.data.latent_shape, generator=generator), None
        else:
            picks = torch.randint(len(self.pairs.rows), (self.size,), generator=generator)
            rows, z, target = self.pairs.rows[picks], self.pairs.noise[picks], self.pairs.target[picks].to(device)
        cond = self.data.conditioning(rows).to(device)
        return Batch(
            z.to(device),
            cond,
            self.data.unconditional(self.size, cond.time_ids).to(device),
            self.data.captions(rows) if self.stage.rewards else (),
            target,
            self.data.sample(rows, generator).to(device) if self.adversary else None,
        )

    def state(self) -> dict[str, Stateful]:
        """What a checkpoint must hold besides the student."""
        parts: dict[str, Stateful | None] = {"critic": self.critic, "discriminator": self.adversary}
        return {name: part for name, part in parts.items() if part is not None}


def _train(
    setup: _Setup,
    name: str,
    parameters: list[nn.Parameter],
    loss_fn: Callable[[torch.Generator], Loss],
    state: Mapping[str, Stateful],
    latents: LatentCache,
    start: LoRA | None,
    checkpoints: CheckpointStore,
    metric_stream: MetricStream,
    after_update: Callable[[], None],
    mixed: StageConfig | None = None,
) -> dict[str, float]:
    """Run the loop; the key holds all that the weights depend on, ``mixed`` (the consistency stage) too."""
    stage, model, adversary = setup.stage, setup.model, setup.adversary
    batch = setup.draw(torch.Generator().manual_seed(0))
    costs_only = {"gradient_checkpointing", "decode_checkpointing", "ema_on_cpu"}  # one may change them after running out of memory
    own = {**stage.model_dump(mode="json", exclude={"feedback_weight", "sampling_eta"} | costs_only), "loop": stage.loop.identity()}
    kept = mixed and {**mixed.model_dump(mode="json"), "loop": {"batch_size": mixed.loop.batch_size}}
    judges = content_hashes(stage.judge_files())
    base = [model.content_hash("unet"), model.prediction_type, model.config.dtype, model.scheduler_config()]
    report = train(
        name,
        parameters=parameters,
        loss_fn=loss_fn,
        config=stage.loop,
        state={**state, **setup.state()},
        key=fingerprint(name, own, kept, judges, latents.key, base, lora_key(start)),
        checkpoints=checkpoints,
        metrics=metric_stream,
        accelerator=setup.accelerator,
        after_update=after_update,
        companions={} if adversary is None else {"discriminator": adversary.optimizer},
        watch=(lambda values, done: None) if adversary is None else adversary.watch,
        constants=measure_forward(setup.adapters, batch.z, batch.cond, setup.accelerator.autocast),
    )
    return with_matching_cost(
        report, stage.matching, stage.loop, adversarial=adversary is not None, full=name != "unified", again=stage.gradient_checkpointing
    )


def _mixed(config: StageConfig | None, stage: OneStepConfig) -> StageConfig | None:
    """The TSCD stage whose loss is mixed in: squared error alone, on batches of its own; None where its weight is 0."""
    if not stage.matching.consistency_weight:
        return None
    assert config is not None
    loop = {"batch_size": stage.matching.consistency_batch * stage.loop.accumulate, "accumulate": stage.loop.accumulate}
    return changed(config, teacher="base", mse_weight=1.0, adversarial={"weight": 0.0}, loop=loop)


def _consistency(
    config: StageConfig, adapters: AdaptedUNet, latents: LatentCache, model: Teacher, accelerator: Accelerator
) -> Callable[[torch.Generator], Loss]:
    step = DistillationStep(adapters, config, model.schedule, model.prediction_type, accelerator.device)
    return Batches(latents, config, accelerator).fed_to(step)


def _load(teacher: TeacherConfig, stage: OneStepConfig, latents: LatentCache, accelerator: Accelerator) -> Teacher:
    model = load_teacher(teacher, parts=("unet", "vae") if stage.rewards else ("unet",), device=accelerator.device)
    latents.require_teacher(model)
    stage.check_schedule(model.schedule)
    return model


def _pairs(stage: OneStepConfig, folder: Path, latents: LatentCache, model: Teacher, start: LoRA | None) -> Pairs | None:
    if not stage.needs_pairs:
        return None
    return read_pairs(folder, pairs_key(stage.pairs, latents, model, start))


def _metadata(model: Teacher, latents: LatentCache) -> dict[str, str]:
    return {
        "method": "distribution matching (Hyper-SD, arXiv 2404.13686, section 3.3)",
        "teacher": model.config.source,
        "teacher_unet_sha256": model.content_hash("unet"),
        "data_key": latents.key,
        "data_rows": latents.parts["rows"],
    }
