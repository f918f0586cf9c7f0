"""The model card of an export, which the Hugging Face hub parses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hypersd_pipeline.export.comfyui import TCD_NODES, as_json, one_step_timestep, simple_timesteps, workflow
from hypersd_pipeline.export.release import Release
from hypersd_pipeline.models.contract import sampling_arguments

GRID = "grid.png"

_METRIC = re.compile(r"(?P<unseen>unseen_)?(?P<metric>\w+)/(?P<steps>\d+)_steps")


def usage(release: Release) -> str:
    """One sentence on how to sample, for readers of metadata."""
    contract, steps = release.contract, release.contract["steps"]
    times = ", ".join(map(str, release.timesteps[steps]))
    eta = f", eta {contract['eta']}" if "eta" in contract else ""
    weight = ", LoRA weight 1" if release.lora else ""
    at = "timesteps" if steps > 1 else "timestep"
    return f"{contract['scheduler']}, {count_steps(steps)} at {at} {times}{eta}, no guidance (CFG 1){weight}."


def card(release: Release, metrics: Mapping[str, Any], files: Mapping[str, str], folder: str) -> str:
    """The card's text: a header for the hub, then how to sample in words and code, the metrics and the image grid.

    Args:
        metrics: of the model's evaluation (`Bench.metrics_of`).
        files: of the export, each with what it is. folder: what the model is called in code, such as ``owner/name``.
    """
    from huggingface_hub import ModelCard, ModelCardData

    rows = _rows(metrics, release.timesteps)
    header = ModelCardData(
        license=release.license,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["hyper-sd", "few-step", "text-to-image", *(["lora"] if release.lora else [])],
        base_model=release.base_model,
        model_name=release.name,
        eval_results=_results(rows, release.provenance.get("data_rows")) or None,
    )
    if release.base_model is not None:
        header["base_model_relation"] = "adapter" if release.lora else "finetune"
    parts = [_opening(release), _in_words(release), _in_diffusers(release, files, folder), _in_comfyui(release), _in_onnx(files)]
    parts += [_metrics_table(rows), _grid(files), _files(files), _origin(release)]
    return str(ModelCard(f"---\n{header.to_yaml()}\n---\n" + "\n".join(part for part in parts if part)))


def count_steps(steps: int) -> str:
    """``1 step``, ``2 steps``."""
    return f"{steps} step" + ("s" if steps > 1 else "")


def _opening(release: Release) -> str:
    many = list(release.timesteps)
    steps = count_steps(many[0]) if len(many) == 1 else f"{', '.join(map(str, many[:-1]))} or {count_steps(many[-1])}"
    kind = "LoRA" if release.lora else "UNet"
    return f"# {release.name}\n\nA {kind} of {release.base} that samples in {steps}, without guidance.\n"


def _in_words(release: Release) -> str:
    """The sampling contract as sentences and a table of timesteps."""
    contract = release.contract
    lines = [
        "## How it is sampled",
        "",
        f"- The scheduler is diffusers' `{contract['scheduler']}`. `scheduler_config.json` in this folder is its configuration.",
        "- There is no classifier-free guidance. In diffusers this is `guidance_scale=0`. In ComfyUI and A1111 it is a CFG scale of 1.",
    ]
    if "eta" in contract:
        lines.append(f"- `eta` is {contract['eta']}. diffusers' pipelines take 0 where nothing is given.")
    if release.lora:
        lines.append("- The weight of the LoRA is 1. Alpha equals the rank in every module.")
    if one_step_timestep(release) is not None:
        lines.append(f"- One step is taken from timestep {one_step_timestep(release)}, not from the last one.")
    lines += [
        "",
        "| steps | timesteps |",
        "|-|-|",
        *(f"| {n} | {', '.join(map(str, grid))} |" for n, grid in release.timesteps.items()),
        "",
    ]
    return "\n".join(lines)


def _in_diffusers(release: Release, files: Mapping[str, str], folder: str) -> str:
    base = release.base_model or ("src/hypersd_pipeline/assets/teacher" if release.small else "path/to/the/base/model")
    scheduler = release.contract["scheduler"]
    if release.lora and "pytorch_lora_weights.safetensors" in files:
        imports, load = scheduler, f'pipeline.load_lora_weights("{folder}", weight_name="pytorch_lora_weights.safetensors")\n'
    elif release.lora and f"{release.name}.safetensors" in files:
        imports, load = scheduler, f'pipeline.load_lora_weights("{folder}", weight_name="{release.name}.safetensors")\n'
    elif f"{release.component}/" in files:
        imports = f"{scheduler}, {release.class_name}"
        load = f'pipeline.{release.component} = {release.class_name}.from_pretrained("{folder}", subfolder="{release.component}")\n'
    else:
        return ""
    calls = [f'image = pipeline("a prompt", {sampling_arguments(release.contract, steps)}).images[0]' for steps in release.timesteps]
    return f"""## diffusers

```python
from diffusers import DiffusionPipeline, {imports}

pipeline = DiffusionPipeline.from_pretrained("{base}")
{load}pipeline.scheduler = {scheduler}.from_pretrained("{folder}")
{chr(10).join(calls)}
```
"""


def _in_comfyui(release: Release) -> str:
    if release.small:
        return "## ComfyUI and A1111\n\nThe small teacher is no model that ComfyUI or A1111 can load.\n"
    if release.lora:
        place = f"Put `{release.name}.safetensors` into `models/loras`."
    else:
        place = f"Copy `{release.component}/diffusion_pytorch_model.safetensors` to `models/diffusion_models/{release.name}.safetensors`."
    parts = [f"## ComfyUI\n\n{place}\n"]
    tcd = release.contract["scheduler"] == "TCDScheduler"
    if tcd:
        parts.append(f"`TCDModelSamplingDiscrete` is a node of [ComfyUI-TCD]({TCD_NODES}).\n")
    elif release.lora:
        parts.append("The sampler is `euler` and the scheduler is `sgm_uniform`, with `cfg` 1.\n")
    steps = release.contract["steps"]
    if tcd:
        told = ", ".join(map(str, simple_timesteps(4, release.contract["scheduler_config"]["num_train_timesteps"])))
        parts.append(f"Its `simple` has the timesteps {told} for 4 steps, which are up to 10 lower than diffusers'.\n")
    nodes = workflow(release, steps)
    if nodes is None:
        parts.append(f"ComfyUI has no node of its own for a step from timestep {one_step_timestep(release)}.\n")
    else:
        parts.append("`comfyui/` has a workflow for each number of steps. Load it with ComfyUI's menu, or send it to its server:\n")
        parts.append(f"```json\n{as_json(nodes)}```\n")
    if not release.lora:
        return "\n".join(parts)
    parts.append("## A1111\n")
    if tcd:
        parts.append("A1111 has no TCD sampler with an `eta`. Its *Euler* with the schedule type *Simple* is `eta` 0, from two steps on.\n")
    else:
        parts.append(f"Sampling method *Euler*, schedule type *SGM Uniform*, {count_steps(steps)}, CFG scale 1.\n")
    return "\n".join(parts)


def _in_onnx(files: Mapping[str, str]) -> str:
    return "" if "onnx/" not in files else "## ONNX\n\n`onnx/model.onnx` is the network alone, in float32. Batch and sides may vary.\n"


def _rows(metrics: Mapping[str, Any], timesteps: Mapping[int, list[int]]) -> list[tuple[str, int, float, float, float]]:
    """Metric, steps, value, low and high of the test split, at the numbers of steps that the model is made for."""
    found = []
    for key, value in metrics.items():
        match = _METRIC.fullmatch(key)
        bounds = metrics.get(f"{key}_low"), metrics.get(f"{key}_high")
        if match and not match["unseen"] and int(match["steps"]) in timesteps and None not in (value, *bounds):
            found.append((match["metric"], int(match["steps"]), float(value), *map(float, bounds)))  # type: ignore[arg-type]
    return found  # type: ignore[return-value]


def _results(rows: list[tuple[str, int, float, float, float]], data: str | None) -> list[Any]:
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-to-image",
            task_name=f"Text to image in {count_steps(steps)}",
            dataset_type="custom",
            dataset_name=f"test split of the training data{f' {data[:16]}' if data else ''}",
            dataset_args={"steps": steps},
            metric_type=metric,
            metric_name=f"{metric} at {count_steps(steps)}",
            metric_value=round(value, 4),
        )
        for metric, steps, value, _, _ in rows
    ]


def _metrics_table(rows: list[tuple[str, int, float, float, float]]) -> str:
    if not rows:
        return ""
    lines = [f"| {metric} | {steps} | {value:.4g} | {low:.4g} to {high:.4g} |" for metric, steps, value, low, high in rows]
    return "\n".join(["## Metrics", "", "On the test split.", "", "| metric | steps | value | 95 % interval |", "|-|-|-|-|", *lines, ""])


def _grid(files: Mapping[str, str]) -> str:
    return f"## Samples\n\n![Samples of the model, a row for each prompt]({GRID})\n" if GRID in files else ""


def _files(files: Mapping[str, str]) -> str:
    return "\n".join(["## Files", "", "| file | content |", "|-|-|", *(f"| `{name}` | {what} |" for name, what in files.items()), ""])


def _origin(release: Release) -> str:
    told = "\n".join(f"- `{key}`: {value}" for key, value in sorted(release.provenance.items()))
    return f"## Origin\n\nTrained with hypersd-pipeline, an open implementation of Hyper-SD (arXiv 2404.13686).\n\n{told}\n"
