"""LoRAs in kohya's layout, which sd-scripts, ComfyUI and A1111 read."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

from hypersd_pipeline.export.release import Release
from hypersd_pipeline.models.backbones import Backbone
from hypersd_pipeline.models.lora import LoRA

_VERSIONS = {"sd15": "sd_v1", "sdxl": "sdxl_base_v1-0"}
_ARCHITECTURES = {"sd15": "stable-diffusion-v1/lora", "sdxl": "stable-diffusion-xl-v1-base/lora"}
_IMPLEMENTATIONS = {"sd15": "diffusers", "sdxl": "https://github.com/Stability-AI/generative-models"}


def to_kohya(lora: LoRA, backbone: Backbone) -> dict[str, Tensor]:
    """The LoRA's tensors under kohya's names, by diffusers' converter: ``lora_down``, ``lora_up`` and ``alpha`` for each module.

    The converter writes the rank as alpha, so that the scale is 1. It keeps diffusers' names of modules. SDXL's get sd-scripts' names.

    Raises:
        UserError: kohya's layout has no name for a module.
    """
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya

    names = {_flat(name): _flat(backbone.kohya_name(name)) for name in lora.modules()}
    tensors = {}
    for key, tensor in convert_state_dict_to_kohya(dict(lora.tensors)).items():
        module, _, part = key.partition(".")
        like = lora.tensors[next(iter(lora.tensors))]
        name = names[module.removeprefix("lora_unet_")]
        tensors[f"lora_unet_{name}.{part}"] = tensor.to(like.dtype) if part == "alpha" else tensor  # an integer in the converter
    return tensors


def _flat(name: str) -> str:
    return name.replace(".", "_")


def kohya_metadata(release: Release, tensors: Mapping[str, Tensor], usage: str) -> dict[str, str]:
    """What sd-scripts (``ss_*``), A1111 (``sshs_*``) and ModelSpec (``modelspec.*``) say of a file, and the contract.

    Args:
        tensors: of `to_kohya`. usage: one sentence on how to sample.
    """
    rank = str(next(len(tensor) for name, tensor in tensors.items() if name.endswith("lora_down.weight")))
    convolutions = any(tensor.shape[2:].numel() > 1 for name, tensor in tensors.items() if tensor.ndim == 4)
    digest = _data_sha256(tensors)
    prediction = release.contract["scheduler_config"].get("prediction_type", "epsilon")
    side = release.resolution
    spec = {
        "sai_model_spec": "1.0.0",
        "architecture": _ARCHITECTURES[release.layout],
        "implementation": _IMPLEMENTATIONS[release.layout],
        "title": release.name,
        "resolution": f"{side}x{side}",
        "description": f"A LoRA of {release.base} for few-step sampling without guidance.",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "license": release.license,
        "usage_hint": usage,
        "tags": "hyper-sd, few-step, lora",
        "prediction_type": {"v_prediction": "v"}.get(prediction, prediction),
        "hash_sha256": f"0x{digest}",
        **({} if release.author is None else {"author": release.author}),
    }
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "ss_network_args": json.dumps({"conv_dim": rank, "conv_alpha": rank} if convolutions else {}),
        "ss_base_model_version": _VERSIONS[release.layout],
        "ss_sd_model_name": release.base,
        "ss_v2": "False",
        "ss_resolution": f"({side}, {side})",
        "ss_output_name": release.name,
        "ss_training_comment": usage,
        "sshs_model_hash": digest,
        **{f"modelspec.{key}": value for key, value in spec.items()},
        **release.metadata,
    }


def _data_sha256(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of a safetensors file behind its header, as sd-scripts and ModelSpec define it."""
    from safetensors.torch import save

    content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    return hashlib.sha256(memoryview(content)[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


def cast(lora: LoRA, dtype: str) -> LoRA:
    """The LoRA with weights in another floating dtype."""
    return LoRA({name: tensor.to(getattr(torch, dtype)) for name, tensor in lora.tensors.items()}, lora.metadata)
