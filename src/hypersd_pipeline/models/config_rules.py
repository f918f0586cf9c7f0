"""What the keys of a configuration of diffusers or transformers may hold, and the sentences for what they may not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hypersd_pipeline.errors import UserError

Good = Callable[[Any], bool]

CURE = "fetch the teacher again, or save it with a pipeline's save_pretrained"


def read_config(path: Path) -> dict[str, Any]:
    """The JSON of a teacher's file.

    Raises:
        UserError: it is missing or cannot be read, or holds no keys and values.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; give a complete diffusers folder of a Stable Diffusion 1.5 or SDXL model.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a complete diffusers folder.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({' '.join(str(error).split())[:100]}); fetch the teacher again.") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no keys and values; fetch the teacher again.")
    return config


def whole(low: int, high: int) -> Good:
    """A whole number from ``low`` to ``high``."""
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def number(low: float, high: float) -> Good:
    """Above ``low``, up to ``high``."""
    return lambda value: isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and low < value <= high


def list_of(good: Good, low: int = 1, high: int = 16) -> Good:
    """A list of ``low`` to ``high`` values, each of them good."""
    return lambda value: isinstance(value, list) and low <= len(value) <= high and all(good(item) for item in value)


def either(*goods: Good) -> Good:
    """Good by one of the rules."""
    return lambda value: any(good(value) for good in goods)


def none(value: Any) -> bool:
    """Null."""
    return value is None


def text(value: Any) -> bool:
    """A text that is not empty."""
    return isinstance(value, str) and bool(value)


WIDTH, DEPTH, SIDE = whole(1, 2**16), whole(1, 128), whole(1, 8192)
WIDTHS = list_of(WIDTH)


def need(path: Path, config: Mapping[str, Any], rules: Mapping[str, tuple[Good, str]], optional: Mapping[str, tuple[Good, str]]) -> None:
    """Raises UserError for a key that is missing, or whose value is not of its kind or range."""
    for key in rules:
        if key not in config:
            raise UserError(f"{path}: {key} is missing; {CURE}.")
    for key, (good, what) in {**rules, **optional}.items():
        if key in config and not good(config[key]):
            raise UserError(f"{path}: {key} is {str(config[key])[:80]!r}, not {what}; {CURE}.")


def check_class(path: Path, config: Mapping[str, Any], expected: str) -> None:
    """Raises UserError for a configuration of another class of diffusers."""
    if config.get("_class_name", expected) != expected:
        raise UserError(f"{path}: _class_name is {config['_class_name']!r}, not {expected!r}; use a Stable Diffusion 1.5 or SDXL teacher.")
