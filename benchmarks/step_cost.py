"""What a distillation step costs, side by side: ours and LCM-LoRA's, in forward passes of one UNet. See docs/benchmarks.md."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import PassCounter, PeakMemory, Task, flops, interleaved, resident_unets, seconds
from presets import PRESETS, Models
from torch import Tensor
from variants import VARIANTS, Bench, ideal, make_step

from hypersd_pipeline.errors import UserError

REFERENCE = "lcm"
PARTS = {  # of the step with teacher: base, and what each would cost without overhead
    "teacher": ("teacher: both halves of the guidance in one call", 2.0),
    "target": ("target: forward with the averaged adapter", 1.0),
    "student": ("student: forward with its adapter, graph kept", 1.0),
    "backward": ("student: backward", 1.0),
    "update": ("clip, AdamW, averaging", 0.0),
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command line. Batch, resolution and rank default to the preset's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="shipped")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--resolution", type=int, help="side of the images in pixels")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of frozen weights and of the computation")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1, help="rounds that are not counted")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write FILE.md and FILE.json too")
    parser.add_argument("--alone", choices=VARIANTS, help=argparse.SUPPRESS)  # what the script starts for the memory of one variant
    args = parser.parse_args(argv)
    preset = PRESETS[args.preset]
    for name in ("batch", "resolution", "rank"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(preset, name))
    for name, low in {"batch": 1, "resolution": 1, "rank": 1, "rounds": 1, "warmup": 0}.items():
        if getattr(args, name) < low:
            parser.error(f"--{name} is {getattr(args, name)}; give {low} or more")
    if args.preset == "shipped" and args.resolution != preset.resolution:
        parser.error(f"--resolution {args.resolution}: the packaged teacher has {preset.resolution} pixels; leave the option out")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: PyTorch finds no GPU here; use --device cpu")
    return args


def make_models(args: argparse.Namespace) -> Models:
    """The preset's models at the asked sizes."""
    return Models(
        PRESETS[args.preset],
        batch=args.batch,
        resolution=args.resolution,
        dtype=getattr(torch, args.dtype),
        device=torch.device(args.device),
        seed=args.seed,
    )


def measure_alone(args: argparse.Namespace) -> dict[str, float]:
    """Peak memory of two steps of one variant (the second has Adam's moments), its passes and operations, and the UNets it holds."""
    import diffusers
    import peft
    import transformers

    # imported by name now: they load lazily, and their code must not count as a model
    _ = (diffusers.UNet2DConditionModel, diffusers.AutoencoderKL, transformers.CLIPTextModelWithProjection, peft.LoraConfig)
    memory = PeakMemory(torch.device(args.device))
    bench = Bench(make_models(args), args.rank, args.gradient_checkpointing, VARIANTS[args.alone])
    step = make_step(bench, VARIANTS[args.alone])
    step()
    backbones = [bench.backbone, *([bench.second_backbone] if "second_backbone" in vars(bench) else [])]
    counter = PassCounter(backbones, args.batch)
    step()
    peak = memory.mb()
    passes = counter.passes()
    with torch.no_grad(), bench.autocast():
        one_forward = flops(lambda: bench.network(None)(bench.x0, _middle(bench), bench.cond))
    vae_and_text = [bench.encoders[0], *bench.encoders[1]] if "encoders" in vars(bench) else []
    resident = resident_unets(bench.backbone.module, vae_and_text)
    return {"peak_memory_mb": peak, "resident_unets": resident, "operations_in_forwards": flops(step) / one_forward, **passes}


def measure_each_alone(argv: list[str]) -> dict[str, dict[str, float]]:
    """`measure_alone` of every variant, each in a process of its own."""
    found = {}
    for name, variant in VARIANTS.items():
        print(f"memory and passes: {variant.title}", file=sys.stderr)
        command = [sys.executable, __file__, *argv, "--alone", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise UserError(f"{variant.title} ended with exit code {done.returncode}; with too little memory use a smaller --batch.")
        found[name] = json.loads(done.stdout.splitlines()[-1])
    return found


def inference_calls(bench: Bench) -> dict[str, Callable[[], Any]]:
    """Everything without gradients that is measured by itself."""
    t, cond, x0 = _middle(bench), bench.cond, bench.x0
    off, plain = bench.network(None), bench.second_backbone
    return {
        "forward": lambda: off(x0, t, cond),
        "encoder": lambda: bench.adapters.features(None, x0, t, cond),
        "plain_forward": lambda: plain(x0, t, cond),
        "teacher": lambda: bench.adapters.denoiser(None).guided(bench.rows.uncond, 3.0).network(x0, t, cond),
        "target": lambda: bench.network("ema")(x0, t, cond),
    }


def training_calls(bench: Bench) -> dict[str, Callable[[], Any]]:
    """The student's part of a step, to be called in this order."""
    losses: list[Tensor] = []

    def forward() -> None:
        with bench.autocast():
            losses.append(bench.network("student")(bench.x0, _middle(bench), bench.cond).float().square().mean())

    return {"student": forward, "backward": lambda: losses.pop().backward(), "update": lambda: bench.update(ema=True)}


def tasks(bench: Bench) -> dict[str, Task]:
    """Everything that is timed in a round: F, the steps, and the parts of ours."""
    device = bench.models.device

    def inference(name: str, call: Callable[[], Any]) -> Task:
        def run() -> dict[str, float]:
            with torch.no_grad(), bench.autocast():
                return {name: seconds(call, device)}

        return run

    def training() -> dict[str, float]:
        return {name: seconds(call, device) for name, call in training_calls(bench).items()}

    def whole_step(name: str, step: Callable[[], None]) -> Task:
        return lambda: {**found["forward"](), name: seconds(step, device)}  # F before each: it divides all, so it must be the surest metric

    found: dict[str, Task] = {name: inference(name, call) for name, call in inference_calls(bench).items()}
    found["training"] = training
    return found | {name: whole_step(name, make_step(bench, variant)) for name, variant in VARIANTS.items()}


def part_operations(bench: Bench) -> dict[str, float]:
    """Operations of each of `PARTS`, over those of one forward of the base UNet."""
    with torch.no_grad(), bench.autocast():
        counts = {name: flops(call) for name, call in inference_calls(bench).items()}
    counts |= {name: flops(call) for name, call in training_calls(bench).items()}
    return {name: counts[name] / counts["forward"] for name in PARTS}


def _middle(bench: Bench) -> Tensor:
    return torch.full((bench.models.batch,), 500, device=bench.models.device)


def rows(bench: Bench, times: dict[str, list[float]], alone: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """One row a variant."""
    forward, share = median(times["forward"]), median(times["encoder"]) / median(times["forward"])
    found = []
    for name, variant in VARIANTS.items():
        step, target = median(times[name]), ideal(bench, variant, share)
        found.append(
            {
                "name": name,
                "title": variant.title,
                "milliseconds": step * 1e3,
                "forwards": step / forward,
                "ideal_forwards": target,
                "over_ideal": step / forward / target,
                "over_lcm": step / median(times[REFERENCE]),
                "memory_over_lcm": alone[name]["peak_memory_mb"] / alone[REFERENCE]["peak_memory_mb"],
                **alone[name],
            }
        )
    return found


def parts(bench: Bench, times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Where the time of the step with ``teacher: base`` goes, in F, against the ideal. ``rest`` is what the parts leave over."""
    forward, operations = median(times["forward"]), part_operations(bench)
    found: list[dict[str, Any]] = []
    for name, (title, ideal_forwards) in PARTS.items():
        if name == "backward" and bench.gradient_checkpointing:
            ideal_forwards += 1.0
        took = median(times[name]) / forward
        found.append({"title": title, "ideal_forwards": ideal_forwards, "operations_in_forwards": operations[name], "forwards": took})
    left = median(times["tscd_base"]) / forward - sum(p["forwards"] for p in found)
    title = "rest: noise, solver, distance"
    return [*found, {"title": title, "ideal_forwards": 0.0, "operations_in_forwards": 0.0, "forwards": left}]


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """What the metrics depend on besides the options."""
    device = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else platform.processor() or platform.machine()
    packages = {name: version(name) for name in ("torch", "diffusers", "peft", "transformers")}
    return {"device": device, "threads": torch.get_num_threads(), **packages}


def markdown(report: dict[str, Any]) -> str:
    """The report as two tables."""
    options = report["options"]
    shape = f"batch {options['batch']}, {options['resolution']} px, {options['dtype']}, rank {options['rank']}"
    lines = [
        f"Preset `{options['preset']}`: {shape}{', gradient checkpointing' if options['gradient_checkpointing'] else ''}; "
        f"median of {options['rounds']} rounds on {report['environment']['device']}, {report['environment']['threads']} threads.",
        f"F, one forward of the base UNet: {report['forward_seconds'] * 1e3:.1f} ms; of a UNet without adapter layers: "
        f"{report['plain_forward_over_forward']:.3f} F; encoder and mid block: {report['encoder_share']:.2f} F. "
        f"The adversarial term adds {report['adversarial_forwards']['base']:.2f} F (base), "
        f"{report['adversarial_forwards']['previous_stage']:.2f} F (previous_stage).",
        "",
        "| step | ideal F | operations, F | time, F | time / ideal | time / LCM | ms | peak MB | peak / LCM | UNets |",
        "|-|-|-|-|-|-|-|-|-|-|",
    ]
    columns = {
        "ideal_forwards": ".2f",
        "operations_in_forwards": ".2f",
        "forwards": ".2f",
        "over_ideal": ".3f",
        "over_lcm": ".3f",
        "milliseconds": ".0f",
        "peak_memory_mb": ".0f",
        "memory_over_lcm": ".3f",
        "resident_unets": ".2f",
    }
    for row in report["rows"]:
        lines.append(f"| {row['title']} | " + " | ".join(format(row[name], spec) for name, spec in columns.items()) + " |")
    lines += [
        "",
        "Where the gap of TSCD, teacher: base, comes from:",
        "",
        "| part | ideal F | operations, F | time, F | gap |",
        "|-|-|-|-|-|",
    ]
    for part in report["parts"]:
        took, least = part["forwards"], part["ideal_forwards"]
        lines.append(f"| {part['title']} | {least:g} | {part['operations_in_forwards']:.3f} | {took:.3f} | {took - least:+.3f} |")
    return "\n".join(lines) + "\n"


def run(args: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """Memory and passes of each variant alone, then all of them timed in one process."""
    alone = measure_each_alone(argv)
    bench = Bench(make_models(args), args.rank, args.gradient_checkpointing)
    times = interleaved(tasks(bench), args.rounds, args.warmup)
    table = rows(bench, times, alone)
    by_name = {r["name"]: r["forwards"] for r in table}
    return {
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "alone"},
        "environment": environment(args),
        "forward_seconds": median(times["forward"]),
        "plain_forward_over_forward": median(times["plain_forward"]) / median(times["forward"]),
        "encoder_share": median(times["encoder"]) / median(times["forward"]),
        "adversarial_forwards": {
            "base": by_name["tscd_base_adversarial"] - by_name["tscd_base"],
            "previous_stage": by_name["tscd_previous_adversarial"] - by_name["tscd_previous"],
        },
        "rows": table,
        "parts": parts(bench, times),
        "round_seconds": times,
    }


def main() -> None:
    """Measure, print, and write where ``--output`` says."""
    argv = sys.argv[1:]
    args = parse(argv)
    try:
        if args.alone:
            print(json.dumps(measure_alone(args)))
            return
        report = run(args, argv)
    except UserError as error:
        sys.exit(f"Error: {error}")
    print(markdown(report))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.with_suffix(".md").write_text(markdown(report))
        args.output.with_suffix(".json").write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
