"""ControlNets (arXiv 2302.05543): diffusers' network beside a frozen UNet, which adds what it sees of a picture of conditions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.files import hub_folder
from hypersd_pipeline.models.backbones import Backbone
from hypersd_pipeline.models.backbones.unet import UNetBackbone, call_arguments
from hypersd_pipeline.models.config_rules import read_config

WEIGHTS = "diffusion_pytorch_model.safetensors"
GAIN = 10.0  # He's initialisation is for dense images. Of lines on black a tenth is left
CHANNELS = (16, 32, 96, 256)  # of the layers that bring the condition to the size of the latents: one halving less than channels


def new_controlnet(backbone: Backbone, factor: int, seed: int) -> Any:
    """A ControlNet for the network, float32: a copy of its encoder, with output layers that begin at zero, so that it changes nothing yet.

    diffusers' layers for the condition end at zero too. They begin so small that sparse lines are lost on the way. Published trainings are
    long enough to grow them. A training of minutes is not, so here they begin at a size that reaches the encoder (`_awaken`).

    Args:
        factor: pixels of the image for each latent, along a side.

    Raises:
        UserError: the network is no UNet.
    """
    from diffusers import ControlNetModel

    if not isinstance(backbone, UNetBackbone):
        raise UserError(f"compatibility.controlnets: a {backbone.class_name} has no ControlNet here; set the entries to null.")
    channels = CHANNELS[: factor.bit_length()] if factor <= 8 else (*CHANNELS, *[CHANNELS[-1]] * (factor.bit_length() - 4))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: Any = ControlNetModel.from_unet(backbone.module, conditioning_embedding_out_channels=channels).float()
        _awaken(made.controlnet_cond_embedding)
        return made


@torch.no_grad()
def _awaken(embedding: torch.nn.Module) -> None:
    """He's initialisation, and a last layer that brings thin lines to about half the size of the encoder's first features."""
    for layer in embedding.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                torch.nn.init.zeros_(layer.bias)
    embedding.conv_out.weight.mul_(GAIN)  # type: ignore[operator, union-attr]


def controlled(backbone: Backbone, controlnet: Any, x_t: Tensor, t: Tensor, cond: Conditioning, condition: Tensor) -> Tensor:
    """The network's raw output ``[b, c, h, w]`` with a ControlNet.

    Args:
        x_t, t, cond: see `Backbone`. condition: ``[b, 3, H, W]`` in [0, 1].
    """
    given = call_arguments(cond.to(dtype=backbone.dtype))
    x = x_t.to(backbone.dtype)
    down, mid = controlnet(x, t, controlnet_cond=condition.to(x), **given, return_dict=False)
    more = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    return backbone.module(x, t, **given, **more, return_dict=False)[0]  # type: ignore[no-any-return]


def find_controlnet(source: str, key: str) -> Path:
    """The local folder of a ControlNet. A hub id is downloaded into the hub's cache.

    Raises:
        UserError: there is none, naming the configuration key.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        if folder.is_absolute() or source.count("/") != 1:
            raise UserError(f"{key}.source: there is no folder {source}; give a ControlNet's folder in diffusers layout, or a hub id.")
        folder = hub_folder(source, ["config.json", WEIGHTS], None, f"{key}.source", "a local folder")
    for name in ("config.json", WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{key}.source: {folder / name} is missing; give a ControlNet's folder in diffusers layout.")
    found = read_config(folder / "config.json").get("_class_name")
    if found != "ControlNetModel":
        raise UserError(f"{key}.source: {folder} holds a {found}, not a ControlNetModel; give a ControlNet's folder.")
    return folder


def load_controlnet(folder: Path, backbone: Backbone, key: str) -> Any:
    """The ControlNet of a folder, frozen, in the network's dtype and on its device.

    Raises:
        UserError: it cannot be read, or is for another network.
    """
    from diffusers import ControlNetModel

    try:
        network: Any = ControlNetModel.from_pretrained(folder, use_safetensors=True, torch_dtype=backbone.dtype, local_files_only=True)
    except Exception as error:  # diffusers has no class of its own for what it cannot read
        told = " ".join(str(error).split()).rstrip(".")[:160]
        raise UserError(f"{key}.source: {folder} cannot be read ({told}); fetch it again.") from error
    for name in ("in_channels", "cross_attention_dim", "block_out_channels"):
        given, needed = (
            list(found) if isinstance(found, tuple | list) else found for found in (network.config[name], backbone.module.config[name])
        )
        if given != needed:
            raise UserError(f"{key}.source: its {name} is {given}, but the teacher's {needed}; use a ControlNet for this model.")
    device = next(backbone.module.parameters()).device
    return network.to(device).requires_grad_(False).eval()
