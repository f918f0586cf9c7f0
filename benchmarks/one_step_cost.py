"""What an update of the one-step stages costs, for the unified LoRA and for the dedicated UNet. See docs/benchmarks.md."""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import torch
from measure import PeakMemory, resident_unets, seconds
from presets import PRESETS, TARGETS, Models

from hypersd_pipeline.models.adapters import AdaptedUNet, checkpoint_gradients
from hypersd_pipeline.models.teacher import denoiser_of
from hypersd_pipeline.training.cost import matching_forwards
from hypersd_pipeline.training.distribution import CRITIC, Batch, Critic, CriticConfig, MatchingConfig, MatchingStep
from hypersd_pipeline.training.ema import ema_update
from hypersd_pipeline.training.loop import LoopConfig, make_optimizer


@dataclass(frozen=True)
class Variant:
    """One row; ``full`` trains every weight of a second UNet, and keeps their average beside it."""

    title: str
    full: bool = False
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    checkpointing: bool = False


VARIANTS = {
    "lora": Variant("unified LoRA: teacher, student, average and critic on one UNet"),
    "lora_checkpointing": Variant("... gradient checkpointing", checkpointing=True),
    "unet": Variant("dedicated UNet, AdamW", full=True),
    "unet_adafactor": Variant("dedicated UNet, Adafactor", full=True, optimizer="adafactor"),
    "unet_adafactor_checkpointing": Variant("... gradient checkpointing", full=True, optimizer="adafactor", checkpointing=True),
}
CONFIG = MatchingConfig(guidance=(3.0, 3.0), critic=CriticConfig(updates=1))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command line; batch, resolution and rank default to the preset's."""
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
    unet, step, update = make_step(models, variant, preset.rank)
    x0, cond = models.latents(unet), models.conditioning(unet)
    uncond = cond[torch.zeros(args.batch, dtype=torch.int64, device=device)]
    batch, generator = Batch(torch.randn_like(x0), cond, uncond, target=x0), torch.Generator().manual_seed(args.seed)

    def autocast() -> AbstractContextManager[object]:
        return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)

    def whole() -> None:
        with autocast():
            loss, _ = step(batch, generator)
        loss.backward()
        update()

    whole()
    whole()  # the optimisers have their moments now
    peak = memory.mb()
    forwards, steps = [], []
    for _ in range(args.rounds):
        with torch.no_grad(), autocast():
            forwards.append(seconds(lambda: step.teacher(x0, torch.full((len(x0),), 500, device=device), cond), device))
        steps.append(seconds(whole, device))
    share = 0.4  # the encoder's; nothing adversarial is measured here
    ideal = matching_forwards(CONFIG, args.batch, share, adversarial=False, full=variant.full, again=variant.checkpointing)
    return {
        "milliseconds": median(steps) * 1e3,
        "forwards": median(steps) / median(forwards),
        "ideal_forwards": ideal,
        "peak_memory_mb": peak,
        "resident_unets": resident_unets(unet, []),
    }


def make_step(models: Models, variant: Variant, rank: int) -> tuple[Any, MatchingStep, Callable[[], None]]:
    """The base UNet, the project's own step, and what updates the student and its average."""
    unet = models.unet()
    student = copy.deepcopy(unet).float().requires_grad_(True) if variant.full else None
    names = (CRITIC,) if variant.full else ("student", "ema", CRITIC)
    adapters = AdaptedUNet(
        unet, rank=rank, target_modules=TARGETS, names=names, trainable=("student", CRITIC) if not variant.full else (CRITIC,)
    )
    for network in (unet, student) if variant.checkpointing else ():
        if network is not None:
            checkpoint_gradients(network)
    critic = Critic(adapters, CONFIG.critic, models.schedule, models.prediction_type)
    if student is None:
        weights, average = adapters.parameters("student"), adapters.parameters("ema")
        denoiser, ready = adapters.denoiser("student"), lambda: adapters.use("student")
    else:
        weights, average = list(student.parameters()), [p.detach().clone() for p in student.parameters()]
        denoiser, ready = denoiser_of(student), lambda: None
    config = MatchingConfig(**{**CONFIG.model_dump(), "regression_weight": 1.0})
    step = MatchingStep(denoiser, adapters.denoiser(None), config, models.schedule, models.prediction_type, ready=ready, critic=critic)
    optimizer = make_optimizer(weights, LoopConfig(steps=1, batch_size=1, learning_rate=1e-6, optimizer=variant.optimizer))

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema_update(average, weights, 0.95)

    return unet, step, update


def main() -> None:
    """Each row in a process of its own, then the table."""
    argv = sys.argv[1:]
    args = parse(argv)
    if args.alone:
        print(json.dumps(measure_alone(args)))
        return
    print("| update | ideal F | time, F | ms | peak MB | UNets |\n|-|-|-|-|-|-|")
    for name, variant in VARIANTS.items():
        done = subprocess.run([sys.executable, __file__, *argv, "--alone", name], stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            sys.exit(f"Error: {variant.title} ended with exit code {done.returncode}; with too little memory use a smaller --batch.")
        row = json.loads(done.stdout.splitlines()[-1])
        columns = (row["ideal_forwards"], row["forwards"], row["milliseconds"], row["peak_memory_mb"], row["resident_unets"])
        print(
            f"| {variant.title} | "
            + " | ".join(format(v, s) for v, s in zip(columns, (".1f", ".2f", ".0f", ".0f", ".2f"), strict=True))
            + " |"
        )


if __name__ == "__main__":
    main()
