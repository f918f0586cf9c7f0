"""Images a second, share of the device's peak and memory of each kind of update, beside LCM-LoRA's step. See docs/benchmarks.md.

    python benchmarks/update_speed.py --preset sdxl --batch 4 --dtype bfloat16

The networks have the published sizes and random weights. Each row runs in a process of its own, on the same device, in one call.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from statistics import median
from typing import Any

import one_step_cost
import torch
from measure import PeakMemory, autocast, each_alone, flops, seconds
from presets import PRESETS, TARGETS, Models
from variants import VARIANTS, Bench, make_step

from hypersd_pipeline.models.adapters import AdaptedBackbone
from hypersd_pipeline.rewards.shipped_quality import ShippedQualityConfig
from hypersd_pipeline.training.config import LoraShape, StageConfig
from hypersd_pipeline.training.loop import LoopConfig, make_optimizer
from hypersd_pipeline.training.stage import build_stage
from hypersd_pipeline.training.terms import AnchorConfig, Context, RewardTermConfig

Step = Callable[[], None]
Precision = Callable[[], AbstractContextManager[object]]

ROWS = {
    "lcm": "LCM-LoRA",
    "tscd": "TSCD",
    "hybrid": "TSCD, adversarial",
    "feedback": "feedback: one step, decoded, packaged reward, anchor",
    "dmd": "one step: matching, one critic update, regression",
}
PEAKS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "4090": 165.0}
"""Dense bf16 operations a second, in 1e12, by what the device's name contains (the vendor's data sheets)."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command line. Batch, resolution and rank default to the preset's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=[name for name, preset in PRESETS.items() if preset.unet], default="sd15")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--resolution", type=int, help="side of the images in pixels")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of frozen weights and of the computation")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3, help="updates that are not counted")
    parser.add_argument("--compile", action="store_true", help="loop.compile, for all rows")
    parser.add_argument("--channels-last", action="store_true", help="loop.channels_last, for all rows")
    parser.add_argument("--peak-tflops", type=float, help="of the device in this dtype; known for " + ", ".join(PEAKS) + " in bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alone", choices=ROWS, help=argparse.SUPPRESS)  # what the script starts for each row
    args = parser.parse_args(argv)
    preset = PRESETS[args.preset]
    args.batch, args.resolution = args.batch or preset.batch, args.resolution or preset.resolution
    return args


def feedback_step(models: Models, rank: int, precision: Precision) -> tuple[Any, Step]:
    """The project's own feedback stage with a decoder and the packaged reward: the network, and an update."""
    backbone, vae = models.backbone(), models.vae()
    adapters = AdaptedBackbone(backbone, models.process, rank=rank, target_modules=TARGETS, names=("student",))
    reward = RewardTermConfig(reward=ShippedQualityConfig(), alpha=100.0, weight=0.1)
    config = StageConfig(
        terms={"quality": reward, "anchor": AnchorConfig()},
        lora=LoraShape(rank=rank, target_modules=TARGETS),
        loop=LoopConfig(steps=1, batch_size=models.batch, learning_rate=1e-6),
    )
    rows = models.rows(backbone)
    context = Context(
        adapters, adapters.denoiser("student"), adapters.denoiser(None), rows, rows.latent_shape, batch=models.batch, device=models.device,
        decode=lambda latents: vae.decode(latents.to(vae.dtype), return_dict=False)[0].float() / 2 + 0.5,
    )  # fmt: skip
    stage = build_stage(config, context, ready=lambda: adapters.use("student"))
    weights, generator = adapters.parameters("student"), torch.Generator().manual_seed(models.seed)
    optimizer = make_optimizer(weights, config.loop)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return backbone, one_step_cost.whole_step(stage, generator, update, precision)


def dmd_step(models: Models, rank: int, precision: Precision) -> tuple[Any, Step]:
    """The project's own one-step stage for the unified LoRA: the network, and an update."""
    variant = one_step_cost.VARIANTS["lora"]
    context, stage, update = one_step_cost.make_step(models, variant, variant.stage(models.batch, rank))
    generator = torch.Generator().manual_seed(models.seed)

    return context.adapters.backbone, one_step_cost.whole_step(stage, generator, update, precision)


def measure_alone(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds, operations and peak memory of an update of one row, in this process."""
    device, preset, dtype = torch.device(args.device), PRESETS[args.preset], getattr(torch, args.dtype)
    memory = PeakMemory(device)
    models = Models(preset, batch=args.batch, resolution=args.resolution, dtype=dtype, device=device, seed=args.seed)
    if args.alone in ("feedback", "dmd"):
        backbone, step = {"feedback": feedback_step, "dmd": dmd_step}[args.alone](models, preset.rank, partial(autocast, device, dtype))
    else:
        variant = VARIANTS[{"lcm": "lcm", "tscd": "tscd_base", "hybrid": "tscd_base_adversarial"}[args.alone]]
        bench = Bench(models, preset.rank, gradient_checkpointing=False, alone=variant)
        backbone, step = bench.backbone, make_step(bench, variant)
    if args.channels_last:
        backbone.lay_out_channels_last()
    operations = flops(step)  # before anything is compiled, whose operations are not seen one by one
    if args.compile:
        backbone.compile()
    for _ in range(args.warmup):
        step()
    took = [seconds(step, device) for _ in range(args.rounds)]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"seconds": median(took), "operations": operations, "peak_memory_mb": memory.mb(), "device": name}


def peak_of(args: argparse.Namespace, device: str) -> float | None:
    """The device's peak in operations a second, where it is known."""
    known = args.peak_tflops or (next((peak for part, peak in PEAKS.items() if part in device), None) if args.dtype == "bfloat16" else None)
    return None if known is None else known * 1e12


def table(args: argparse.Namespace, rows: dict[str, dict[str, Any]]) -> str:
    """The rows, beside LCM-LoRA's."""
    device = rows["lcm"]["device"]
    peak, reference = peak_of(args, device), rows["lcm"]
    lines = [
        f"`{args.preset}`, batch {args.batch}, {args.resolution} px, {args.dtype}, {device}; median of {args.rounds} updates"
        f"{', compiled' if args.compile else ''}{', channels last' if args.channels_last else ''}.",
        "",
        "| update | ms | images/s | time / LCM | 1e12 operations/s | share of the peak | peak MB | peak / LCM |",
        "|-|-|-|-|-|-|-|-|",
    ]
    for name, row in rows.items():
        rate = row["operations"] / row["seconds"]
        share = "unknown" if peak is None else f"{rate / peak:.3f}"
        took, memory = row["seconds"] / reference["seconds"], row["peak_memory_mb"] / reference["peak_memory_mb"]
        columns = [f"{row['seconds'] * 1e3:.0f}", f"{args.batch / row['seconds']:.2f}", f"{took:.2f}", f"{rate / 1e12:.2f}", share]
        lines.append(f"| {ROWS[name]} | {' | '.join(columns)} | {row['peak_memory_mb']:.0f} | {memory:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Each row in a process of its own, then the table."""
    argv = sys.argv[1:]
    args = parse(argv)
    if args.alone:
        print(json.dumps(measure_alone(args)))
        return
    rows = dict(each_alone(__file__, argv, ROWS))
    print(table(args, rows))


if __name__ == "__main__":
    main()
