"""LoRAs of the user's own, from which a first stage may start: any layout that diffusers reads, brought to ours."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.backbones import Backbone
from hypersd_pipeline.models.lora import LoRA

WEIGHTS = "pytorch_lora_weights.safetensors"

_OTHER_KINDS = {"hada_": "LoHa", "lokr_": "LoKr", "oft_": "OFT", "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA"}
_TEXT_ENCODERS = ("lora_te_", "lora_te1_", "lora_te2_", "text_encoder.", "text_encoder_2.")


def user_lora_file(path: Path) -> Path:
    """The file of weights: the path itself, or the one in its folder.

    Raises:
        UserError: there is none, there are several, or it is no safetensors file.
    """
    path = path.expanduser()
    if path.is_dir():
        found = [path / WEIGHTS] if (path / WEIGHTS).is_file() else sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            raise UserError(f"start: {path} has {len(found)} .safetensors files; name the LoRA's file.")
        return found[0]
    if not path.is_file():
        raise UserError(f"start: there is no file or folder {path}; correct the path, or set start to null.")
    if path.suffix != ".safetensors":
        raise UserError(f"start: {path} is no .safetensors file; convert it, as other formats may run code when they are read.")
    return path


def read_user_lora(path: Path, backbone: Backbone) -> LoRA:
    """A LoRA as diffusers understands it, in our layout: each B is multiplied by alpha / rank, so that the scale is 1.

    Args:
        path: a ``.safetensors`` of diffusers (PEFT or older layout) or kohya, or a folder with one.
        backbone: the network that it was trained for.

    Returns:
        Float32 pairs. The rank may differ from module to module.

    Raises:
        UserError: it cannot be read, is of another kind or for another network, or changes a text encoder.
    """
    file = user_lora_file(path)
    try:
        with safe_open(file, framework="pt") as content:
            names = list(content.keys())
    except SafetensorError as error:
        raise UserError(f"start: {file} is damaged ({error}); fetch it again.") from error
    for mark, kind in _OTHER_KINDS.items():
        if any(mark in name for name in names):
            raise UserError(f"start: {file} is a {kind}, which is not supported; use a plain LoRA, or merge it into the teacher.")
    if any(name.startswith(_TEXT_ENCODERS) for name in names):
        raise UserError(f"start: {file} also changes a text encoder, which is not trained here; merge it into the teacher.")
    try:
        pairs = backbone.read_lora_pairs(file)
    except UserError as error:
        raise UserError(f"start: {file}: {error}") from error
    for name, pair in pairs.items():
        if not all(bool(torch.isfinite(tensor).all()) for tensor in pair):
            raise UserError(f"start: {file}: module {name!r} has values that are NaN or infinite; fetch or train it again.")
    prefix = backbone.component
    tensors = {f"{prefix}.{name}.lora_{half}.weight": t for name, pair in pairs.items() for half, t in zip("AB", pair, strict=True)}
    return LoRA(tensors)
