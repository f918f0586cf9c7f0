"""An ``open_clip`` architecture filled with one checked weights file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.tensors import Shapes, shapes_of
from hypersd_pipeline.rewards.weights import load_strictly, read_tensors


def check_open_clip(name: str, key: str) -> dict[str, Any]:
    """The configuration of an architecture.

    Raises:
        UserError: open_clip knows no such name.
    """
    import open_clip

    config = open_clip.get_model_config(name)
    if config is None:
        raise UserError(f"{key}: open_clip has no architecture {name!r}; choose one of open_clip.list_models().")
    return config


def open_clip_shapes(name: str, key: str) -> Shapes:
    """Names and shapes of the tensors of an architecture. Raises UserError as `check_open_clip`."""
    from open_clip.model import CLIP

    return shapes_of(lambda: CLIP(**open_clip_sizes(check_open_clip(name, key))))


def open_clip_sizes(config: dict[str, Any]) -> dict[str, Any]:
    """What ``open_clip.model.CLIP`` takes of a configuration."""
    return {k: v for k, v in config.items() if k in ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu")}


def build_open_clip(name: str, path: Path, key: str) -> Any:
    """The frozen ``open_clip.model.CLIP`` named ``name`` with the weights of ``path``, on the CPU.

    Raises:
        UserError: no such architecture, or the file holds another one.
    """
    from open_clip.model import CLIP

    config = check_open_clip(name, key)
    tensors = read_tensors(path)
    model = CLIP(**open_clip_sizes(config))
    load_strictly(model, tensors, path)
    return model.eval().requires_grad_(False)


def image_side(visual: Any) -> int:
    """Pixels of the square that a vision tower sees."""
    size = visual.image_size
    return int(size[0] if isinstance(size, (tuple, list)) else size)
