"""Base class of every configuration object, and the kinds of numbers that they hold: each is finite and in a range that can be meant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1, le=10**9)]
"""How many rows, samples of a batch, or updates."""
Steps = Annotated[int, Field(ge=1, le=1000)]
"""Steps of a sampler."""
Timestep = Annotated[int, Field(ge=1, lt=100_000)]
"""A timestep of the teacher's schedule, which ends at T - 1 (`Process`)."""
Width = Annotated[int, Field(ge=1, le=2**16)]
"""Channels, heads, layers, ranks."""
Side = Annotated[int, Field(ge=8, le=8192)]
"""Side of an image in pixels."""
Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""What PyTorch's and NumPy's generators both take."""
Guidance = Annotated[float, Field(ge=1, le=100)]
"""A scale of classifier-free guidance; 1 is none."""
Weight = Annotated[float, Field(ge=0, le=1e6)]
"""Of a term in a loss, or of a LoRA."""
Rate = Annotated[float, Field(gt=0, le=10)]
"""A learning rate."""
Decay = Annotated[float, Field(ge=0, lt=1)]
"""Of a moving average. Also a chance."""
Share = Annotated[float, Field(ge=0, le=1)]
"""A part of a whole."""

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{8,64}$")]
"""A file's sha256, or its first digits, eight at least."""

_MEANT = {False: ("no", "off"), True: ("yes", "on")}
"""YAML's words for false and true, which a choice may offer as names."""


class Strict(BaseModel):
    """A frozen config that refuses unknown keys, so that a misspelt key in ``conf/`` is an error and not a default.

    Numbers are finite. YAML reads the words no, off, yes and on as false and true: where a key's choices are such words they are taken for
    them, and where a key is a number they are refused.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    later: ClassVar[frozenset[str]] = frozenset()
    """Keys that came later, whose default is what was done before: `for_key` leaves them out at their default."""

    @model_validator(mode="before")
    @classmethod
    def _yaml_words(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return {key: _meant(value, cls.model_fields[key].annotation) if key in cls.model_fields else value for key, value in values.items()}


def for_key(config: BaseModel) -> dict[str, Any]:
    """The configuration as part of a key. Keys that came later are left out at their default, so that older keys hold."""
    values = config.model_dump(mode="json")
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if name in getattr(config, "later", ()) and value == field.get_default(call_default_factory=True):
            del values[name]
        elif isinstance(value, BaseModel):
            values[name] = for_key(value)
    return values


def _meant(value: Any, annotation: Any) -> Any:
    """`value`, with a false or true in it as the word that was meant. For a number it becomes text, which pydantic refuses."""
    if isinstance(value, list | tuple):
        return [_meant(item, annotation) if isinstance(item, bool) else item for item in value]
    if not isinstance(value, bool):
        return value
    kinds = list(_leaves(annotation))
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    words = [word for word in _MEANT[value] if word in choices]
    only_number = bool not in kinds and (int in kinds or float in kinds)
    return words[0] if words else str(value).lower() if only_number else value


def _leaves(annotation: Any) -> Iterator[Any]:
    """The kinds of values that an annotation allows, out of its unions and containers."""
    if get_origin(annotation) is Literal or not get_args(annotation):
        yield annotation
    else:
        for part in get_args(annotation):
            yield from _leaves(part)
