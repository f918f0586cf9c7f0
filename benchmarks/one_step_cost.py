"""What an update of the one-step stages costs, for the unified LoRA and for the dedicated UNet. See docs/benchmarks.md."""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Literal

import torch
from measure import PeakMemory, autocast, each_alone, resident_unets, seconds
from presets import PRESETS, TARGETS, Models

from hypersd_pipeline.data.trajectories import NoisePairs
from hypersd_pipeline.diffusion.denoiser import Denoiser
from hypersd_pipeline.models.adapters import AdaptedBackbone
from hypersd_pipeline.training.config import LoraShape, StageConfig
from hypersd_pipeline.training.cost import ideal_forwards
from hypersd_pipeline.training.critic import CRITIC, CriticConfig
from hypersd_pipeline.training.ema import ema_update
from hypersd_pipeline.training.loop import LoopConfig, make_optimizer
from hypersd_pipeline.training.stage import Stage, build_stage
from hypersd_pipeline.training.terms import Context, MatchingConfig, RegressionConfig


@dataclass(frozen=True)
class Variant:
    """One row. ``full`` trains every weight of a second UNet, and keeps their average beside it."""

    title: str
    full: bool = False
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    checkpointing: bool = False

    def stage(self, batch: int, rank: int) -> StageConfig:
        """The stage configuration: matching, and regression on stored pairs."""
        return StageConfig(
            terms={
                "matching": MatchingConfig(guidance=(3.0, 3.0), critic=CriticConfig(updates=1)),
                "regression": RegressionConfig(),
            },
            gradient_checkpointing=self.checkpointing,
            lora=LoraShape(rank=rank, target_modules=TARGETS),
            loop=LoopConfig(steps=1, batch_size=batch, learning_rate=1e-6, optimizer=self.optimizer),
        )


VARIANTS = {
    "lora": Variant("unified LoRA: teacher, student, average and critic on one UNet"),
    "lora_checkpointing": Variant("... gradient checkpointing", checkpointing=True),
    "unet": Variant("dedicated UNet, AdamW", full=True),
    "unet_adafactor": Variant("dedicated UNet, Adafactor", full=True, optimizer="adafactor"),
    "unet_adafactor_checkpointing": Variant("... gradient checkpointing", full=True, optimizer="adafactor", checkpointing=True),
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command line. Batch, resolution and rank default to the preset's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="shipped")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the frozen weights and of the computation")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alone", choices=VARIANTS, help=argparse.SUPPRESS)  # what the script starts for each row
    args = parser.parse_args(argv)
    args.batch = args.batch or PRESETS[args.preset].batch
    return args


def measure_alone(args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of an update and of F in turns, peak memory and UNets in memory, of one variant in this process."""
    variant, preset, device = VARIANTS[args.alone], PRESETS[args.preset], torch.device(args.device)
    import diffusers
    import peft

    _ = (diffusers.UNet2DConditionModel, peft.LoraConfig)  # they load lazily, and their code must not count as a model
    memory = PeakMemory(device)
    dtype = getattr(torch, args.dtype)
    models = Models(preset, batch=args.batch, resolution=preset.resolution, dtype=dtype, device=device, seed=args.seed)
    config, generator = variant.stage(args.batch, preset.rank), torch.Generator().manual_seed(args.seed)
    context, stage, update = make_step(models, variant, config)
    x0, cond = context.data.latents, context.data.cond  # type: ignore[attr-defined]  # of `FixedRows`

    precision = partial(autocast, device, dtype)
    whole = whole_step(stage, generator, update, precision)
    whole()
    whole()  # the optimisers have their moments now
    peak = memory.mb()
    forwards, steps = [], []
    for _ in range(args.rounds):
        with torch.no_grad(), precision():
            forwards.append(seconds(lambda: context.base.network(x0, torch.full((len(x0),), 500, device=device), cond), device))
        steps.append(seconds(whole, device))
    share = 0.4  # the encoder's. Nothing adversarial is measured here
    return {
        "milliseconds": median(steps) * 1e3,
        "forwards": median(steps) / median(forwards),
        "ideal_forwards": ideal_forwards(config, share, full=variant.full),
        "peak_memory_mb": peak,
        "resident_unets": resident_unets(context.adapters.backbone.module, []),
    }


def whole_step(
    stage: Stage, generator: torch.Generator, update: Callable[[], None], precision: Callable[[], AbstractContextManager[object]]
) -> Callable[[], None]:
    """An update from the loss to the weights."""

    def step() -> None:
        with precision():
            loss, _ = stage(generator)
        loss.backward()
        update()

    return step


def make_step(models: Models, variant: Variant, config: StageConfig) -> tuple[Context, Stage, Callable[[], None]]:
    """What the stage is built from, the project's own stage, and what updates the student and its average."""
    backbone = models.backbone()
    trained = type(backbone)(copy.deepcopy(backbone.module).float().requires_grad_(True)) if variant.full else None
    adapters = AdaptedBackbone(
        backbone,
        models.process,
        rank=config.lora.rank,
        target_modules=TARGETS,
        names=(CRITIC,) if variant.full else ("student", "ema", CRITIC),
        trainable=(CRITIC,) if variant.full else ("student", CRITIC),
    )
    for network in (backbone, trained) if variant.checkpointing else ():
        if network is not None:
            network.checkpoint_gradients()
    if trained is None:
        weights, average = adapters.parameters("student"), adapters.parameters("ema")
        student, ready = adapters.denoiser("student"), lambda: adapters.use("student")
    else:
        weights = list(trained.module.parameters())
        average = [p.detach().clone() for p in weights]
        student, ready = Denoiser(trained, models.process), lambda: None
    rows = models.rows(backbone)
    pairs = NoisePairs(torch.randn_like(rows.latents), rows.latents, torch.arange(len(rows)))
    context = Context(
        adapters, student, adapters.denoiser(None), rows, rows.latent_shape, batch=models.batch, device=models.device, pairs=pairs
    )  # type: ignore[arg-type]
    optimizer = make_optimizer(weights, config.loop)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema_update(average, weights, 0.95)

    return context, build_stage(config, context, ready), update


def main() -> None:
    """Each row in a process of its own, then the table."""
    argv = sys.argv[1:]
    args = parse(argv)
    if args.alone:
        print(json.dumps(measure_alone(args)))
        return
    print("| update | ideal F | time, F | ms | peak MB | UNets |\n|-|-|-|-|-|-|")
    for name, row in each_alone(__file__, argv, {name: variant.title for name, variant in VARIANTS.items()}):
        columns = (row["ideal_forwards"], row["forwards"], row["milliseconds"], row["peak_memory_mb"], row["resident_unets"])
        print(
            f"| {VARIANTS[name].title} | "
            + " | ".join(format(v, s) for v, s in zip(columns, (".1f", ".2f", ".0f", ".0f", ".2f"), strict=True))
            + " |"
        )


if __name__ == "__main__":
    main()
