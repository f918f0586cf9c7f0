"""Network families: one class each, which holds all that the project has to know of a network."""

from __future__ import annotations

from pathlib import Path

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.backbones.base import Backbone
from hypersd_pipeline.models.backbones.unet import UNetBackbone

__all__ = ["FAMILIES", "Backbone", "UNetBackbone", "family_of"]

FAMILIES: tuple[type[Backbone], ...] = (UNetBackbone,)
"""Every family that a teacher's folder may hold."""


def family_of(folder: Path) -> type[Backbone]:
    """The family of the network in a diffusers folder, by the name of its component.

    Raises:
        UserError: the folder holds no network of a known family.
    """
    for family in FAMILIES:
        if (folder / family.component).is_dir():
            return family
    known = ", ".join(family.component for family in FAMILIES)
    raise UserError(f"{folder} has none of the folders {known}; give a complete diffusers folder of a Stable Diffusion 1.5 or SDXL model.")
