"""The training steps that are compared: ours, and LCM-LoRA's as its public script takes it. All on one UNet, batch, rank and optimiser."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any, Literal

import torch
from presets import TARGETS, Models
from torch import Tensor

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.diffusion.denoiser import Denoiser, Network
from hypersd_pipeline.models.adapters import AdaptedBackbone
from hypersd_pipeline.models.backbones import Backbone
from hypersd_pipeline.objectives.consistency import huber
from hypersd_pipeline.recipes.distil import make_adapters
from hypersd_pipeline.training.config import LoraShape, StageConfig
from hypersd_pipeline.training.cost import ideal_forwards
from hypersd_pipeline.training.ema import ema_update
from hypersd_pipeline.training.loop import LoopConfig, adamw
from hypersd_pipeline.training.stage import build_stage
from hypersd_pipeline.training.terms import AdversarialConfig, ConsistencyConfig, Context

Loss = Callable[[torch.Generator], Tensor]
SEGMENTS = 2  # of a stage. Any number costs the same
VAE_CHUNK = 32  # images that LCM's script encodes at a time


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        title: as printed.
        kind: ``tscd``, or one of LCM's: ``lcm`` as the script is, ``lcm_cached`` without VAE and text encoders, ``lcm_two_unets`` with a
            second UNet as the teacher.
        teacher, adversarial: of ``tscd``.
    """

    title: str
    kind: Literal["tscd", "lcm", "lcm_cached", "lcm_two_unets"]
    teacher: Literal["base", "previous_stage"] = "base"
    adversarial: bool = False

    def stage(self, batch: int, rank: int, gradient_checkpointing: bool) -> StageConfig:
        """The stage configuration of a ``tscd`` variant. What is not named here does not change the cost."""
        return StageConfig(
            terms={
                "consistency": ConsistencyConfig(segments=SEGMENTS, teacher=self.teacher, guidance=(3.0, 15.0)),
                "adversarial": AdversarialConfig(weight=1.0 if self.adversarial else 0.0),
            },
            gradient_checkpointing=gradient_checkpointing,
            lora=LoraShape(rank=rank, target_modules=TARGETS),
            loop=LoopConfig(steps=1, batch_size=batch, learning_rate=1e-6),
        )


VARIANTS = {
    "tscd_base": Variant("TSCD, teacher: base", "tscd"),
    "tscd_previous": Variant("TSCD, teacher: previous_stage", "tscd", "previous_stage"),
    "tscd_base_adversarial": Variant("TSCD, teacher: base, adversarial", "tscd", "base", True),
    "tscd_previous_adversarial": Variant("TSCD, teacher: previous_stage, adversarial", "tscd", "previous_stage", True),
    "lcm": Variant("LCM-LoRA", "lcm"),
    "lcm_cached": Variant("LCM-LoRA without VAE and text encoders", "lcm_cached"),
    "lcm_two_unets": Variant("LCM-LoRA, two UNets", "lcm_two_unets"),
}


class Bench:
    """The models, the batch and the optimiser that the steps share. What a step does not use is never loaded.

    Args:
        alone: the only variant that will run, whose adapters are made. None for all of them.
    """

    def __init__(self, models: Models, rank: int, gradient_checkpointing: bool, alone: Variant | None = None) -> None:
        self.models, self.rank, self.gradient_checkpointing = models, rank, gradient_checkpointing
        self.backbone = models.backbone()
        if alone is not None and alone.kind != "tscd":  # the public script has the student's adapter only
            self.adapters = AdaptedBackbone(self.backbone, models.process, rank=rank, target_modules=TARGETS, names=("student",))
            if gradient_checkpointing:
                self.backbone.checkpoint_gradients()
        else:
            teacher: Any = SimpleNamespace(backbone=self.backbone, process=models.process)
            self.adapters = make_adapters(teacher, self.stage(alone or VARIANTS["tscd_previous"]))
        self.student = self.adapters.parameters("student")
        self.optimizer = adamw(self.student, lr=1e-6, weight_decay=0.0)
        self.rows = models.rows(self.backbone)
        self.x0, self.cond = self.rows.latents, self.rows.cond
        self.generator = torch.Generator().manual_seed(models.seed)

    def stage(self, variant: Variant) -> StageConfig:
        """The variant's stage configuration at this batch and rank."""
        return variant.stage(self.models.batch, self.rank, self.gradient_checkpointing)

    def network(self, name: str | None) -> Network:
        """The UNet with an adapter, or without."""
        return self.adapters.denoiser(name).network

    @cached_property
    def second_backbone(self) -> Backbone:
        """A whole second UNet, without adapter layers."""
        return self.models.backbone()

    @cached_property
    def encoders(self) -> tuple[Any, list[Any]]:
        """VAE and text encoders."""
        return self.models.vae(), self.models.text_encoders()

    def autocast(self) -> AbstractContextManager[object]:
        """What the forward passes run under: bfloat16 where the weights are. The LoRAs stay in float32."""
        half = self.models.dtype == torch.bfloat16
        return torch.autocast(self.models.device.type, torch.bfloat16, enabled=half)

    def update(self, *opponents: torch.optim.Optimizer, ema: bool) -> None:
        """Clip and step as the training loop does, then average where the method does."""
        optimizers = (self.optimizer, *opponents)
        norms = [torch.nn.utils.clip_grad_norm_([p for g in o.param_groups for p in g["params"]], 1.0) for o in optimizers]
        if not bool(torch.isfinite(torch.stack(norms)).all()):
            raise FloatingPointError("a gradient is not finite, so the step would not be a whole one")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if ema:
            ema_update(self.adapters.parameters("ema"), self.student, 0.95)


def make_step(bench: Bench, variant: Variant) -> Callable[[], None]:
    """The variant's whole optimiser step, from the batch to the updated weights."""
    if variant.kind == "tscd":
        return _tscd_step(bench, variant)
    loss = LcmLoss(bench, encode=variant.kind != "lcm_cached", second_unet=variant.kind == "lcm_two_unets")

    def step() -> None:
        with bench.autocast():
            value = loss(bench.generator)
        value.backward()
        bench.update(ema=False)

    return step


def _tscd_step(bench: Bench, variant: Variant) -> Callable[[], None]:
    models, adapters, rows = bench.models, bench.adapters, bench.rows
    context = Context(
        adapters, adapters.denoiser("student"), adapters.denoiser(None), rows, rows.latent_shape, batch=models.batch, device=models.device,
        segments=SEGMENTS,
    )  # fmt: skip
    stage = build_stage(bench.stage(variant), context, ready=lambda: adapters.use("student"))

    def step() -> None:
        with bench.autocast():
            value, _ = stage(bench.generator)
        value.backward()
        bench.update(*stage.companions().values(), ema=True)

    return step


class LcmLoss:
    """LCM-LoRA's loss (arXiv 2311.05556) in the order of its public script: encode, student, teacher twice, target.

    Wherever the script leaves a choice it is made in its favour: adapters are switched by our own switch, which costs less than peft's.
    The VAE has the UNet's dtype. Reading and tokenising are free.

    Args:
        encode: images and prompts are encoded at every step. Otherwise they come from a cache.
        second_unet: the teacher is a UNet of its own and not the student's with the adapters off.
    """

    def __init__(self, bench: Bench, *, encode: bool, second_unet: bool, solver_points: int = 50) -> None:
        models = bench.models
        self.bench, self.process = bench, models.process
        self.skip = models.process.num_train_timesteps // solver_points
        self.grid = torch.arange(1, solver_points + 1) * self.skip - 1
        self.student = bench.adapters.denoiser("student")
        self.teacher = Denoiser(bench.second_backbone, models.process) if second_unet else bench.adapters.denoiser(None)
        self.raw = (models.images(), models.token_ids(), *bench.encoders) if encode else None

    def __call__(self, generator: torch.Generator) -> Tensor:
        """The mean pseudo-Huber distance of the student's and the target's clean samples."""
        x0, cond = (self.bench.x0, self.bench.cond) if self.raw is None else self._encode(*self.raw)
        t_n = self.grid[torch.randint(len(self.grid), (len(x0),), generator=generator)]
        guidance = (2.0 + 12.0 * torch.rand(len(x0), generator=generator)).view(-1, 1, 1, 1).to(x0.device)
        t_prev = (t_n - self.skip).clamp(min=0).to(x0.device)
        t_n = t_n.to(x0.device)
        x_tn = self.process.add_noise(x0, torch.randn(x0.shape, generator=generator).to(x0.device), t_n)
        prediction = self._consistency(x_tn, t_n, cond)
        with torch.no_grad():
            known, unknown = (self.teacher.predict(x_tn, t_n, c) for c in (cond, self.bench.rows.uncond))
            x0_hat, eps_hat = (c + guidance * (c - u) for c, u in zip(known, unknown, strict=True))
            target = self._consistency(self.process.ddim(x0_hat, eps_hat, t_prev), t_prev, cond)
        return huber(prediction, target)

    def _consistency(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        # c_skip x + c_out x0 with sigma_data 0.5 and times scaled by 10 (LCM, arXiv 2310.04378, appendix)
        scaled = (10.0 * t).view(-1, 1, 1, 1)
        c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()
        return c_skip * x + c_out * self.student.predict(x, t, cond)[0]

    @torch.no_grad()
    def _encode(self, images: Tensor, token_ids: Tensor, vae: Any, text_encoders: list[Any]) -> tuple[Tensor, Conditioning]:
        latents = torch.cat([vae.encode(part.to(vae.dtype)).latent_dist.sample() for part in images.split(VAE_CHUNK)])
        x0 = latents.float() * vae.config.scaling_factor
        if len(text_encoders) == 1:
            return x0, Conditioning(text_encoders[0](token_ids)[0])
        outputs = [encoder(token_ids, output_hidden_states=True) for encoder in text_encoders]
        embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return x0, Conditioning(embeds, outputs[-1][0], self.bench.cond.sizes)


def ideal(bench: Bench, variant: Variant, encoder_share: float) -> float:
    """Forward equivalents of the step's passes through the UNet, without any overhead (5 for LCM-LoRA as for TSCD)."""
    tscd = variant if variant.kind == "tscd" else VARIANTS["tscd_base"]
    return ideal_forwards(bench.stage(tscd), encoder_share)
