"""A sampling contract as a workflow of ComfyUI, in the form that its server takes and its menu loads (API format)."""

from __future__ import annotations

import json
from typing import Any

from hypersd_pipeline.export.release import Release

TCD_NODES = "https://github.com/JettHu/ComfyUI-TCD"
"""Nodes beside ComfyUI's own, for TCDScheduler's steps with an eta."""

Workflow = dict[str, dict[str, Any]]


def one_step_timestep(release: Release) -> int | None:
    """The timestep of the contract's one step, where it is not the last one of the schedule."""
    last = release.contract["scheduler_config"]["num_train_timesteps"] - 1
    first = release.timesteps.get(1, [last])[0]
    return None if first == last else first


def simple_timesteps(steps: int, total: int) -> list[int]:
    """The timesteps of ComfyUI's and A1111's ``simple``: from the last one down, at equal distances."""
    return [total - 1 - i * total // steps for i in range(steps)]


def workflow(release: Release, steps: int) -> Workflow | None:
    """The nodes that sample one image. None where ComfyUI has no nodes for the contract.

    - DDIM on the trailing grid is ComfyUI's ``euler`` with ``sgm_uniform``. Its timesteps are off by less than 1.
    - TCDScheduler's grid is ``simple`` in `TCD_NODES`, whose timesteps are up to 15 lower (`simple_timesteps`).
    - One step from a timestep such as 800 is ``SDTurboScheduler``, which has 799.

    Args:
        steps: one of ``release.timesteps``.
    """
    told = one_step_timestep(release) if steps == 1 else None
    if told is not None and not -1 <= round(told, -2) - 1 - told <= 1:
        return None
    model = ["lora", 0] if release.lora else ["network", 0]
    nodes = _shared(release)
    sampler: dict[str, Any] = {"positive": ["prompt", 0], "negative": ["empty", 0], "latent_image": ["latents", 0], "cfg": 1.0}
    custom = {**sampler, "add_noise": True, "noise_seed": 0}
    if told is not None:
        nodes["euler"] = _node("KSamplerSelect", sampler_name="euler")
        nodes["sigmas"] = _node("SDTurboScheduler", model=model, steps=1, denoise=round(told, -2) / 1000)
        nodes["sample"] = _node("SamplerCustom", model=model, sampler=["euler", 0], sigmas=["sigmas", 0], **custom)
    elif release.contract["scheduler"] == "TCDScheduler":
        nodes["tcd"] = _node(
            "TCDModelSamplingDiscrete", model=model, steps=steps, scheduler="simple", denoise=1.0, eta=release.contract["eta"]
        )
        nodes["sample"] = _node("SamplerCustom", model=["tcd", 0], sampler=["tcd", 1], sigmas=["tcd", 2], **custom)
    else:
        nodes["sample"] = _node(
            "KSampler", model=model, seed=0, steps=steps, sampler_name="euler", scheduler="sgm_uniform", denoise=1.0, **sampler
        )
    nodes["image"] = _node("VAEDecode", samples=["sample", 0], vae=["checkpoint", 2])
    nodes["save"] = _node("SaveImage", images=["image", 0], filename_prefix=release.name)
    return nodes


def as_json(nodes: Workflow) -> str:
    """The workflow with a node on each line."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(node)}" for name, node in nodes.items())
    return f"{{\n{lines}\n}}\n"


def _shared(release: Release) -> Workflow:
    """Loaders, prompts and latents. The file of the base model stands for any checkpoint of its family."""
    side = release.resolution
    nodes = {
        "checkpoint": _node("CheckpointLoaderSimple", ckpt_name="base_model.safetensors"),
        "prompt": _node("CLIPTextEncode", text="a photo of a fox", clip=["checkpoint", 1]),
        "empty": _node("CLIPTextEncode", text="", clip=["checkpoint", 1]),
        "latents": _node("EmptyLatentImage", width=side, height=side, batch_size=1),
    }
    if release.lora:
        nodes["lora"] = _node("LoraLoaderModelOnly", model=["checkpoint", 0], lora_name=f"{release.name}.safetensors", strength_model=1.0)
    else:
        nodes["network"] = _node("UNETLoader", unet_name=f"{release.name}.safetensors", weight_dtype="default")
    return nodes


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}
