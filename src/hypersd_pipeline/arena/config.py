"""What the arena is told."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, field_validator

from hypersd_pipeline.config import Count, Steps, Strict
from hypersd_pipeline.diffusion.grids import TCD_POINTS
from hypersd_pipeline.errors import UserError

TEACHER = "teacher"
"""The name of the teacher among the models. Every other name is a LoRA's: ``k4`` is ``lora_k4``."""

Prompt = Annotated[str, Field(min_length=1, max_length=1000)]


class ArenaConfig(Strict):
    """The page and the study.

    Attributes:
        shown: model -> numbers of steps that the page samples for a prompt. A null leaves a model of another environment out.
        voted: the same for the pairs that people vote on. Two contenders at least.
        prompts: what pairs are sampled for. None takes the captions of the split ``test``.
        question: what voters are asked.
        host: the address that the page is served on. The default is reached from this machine only.
        port: of the page. 0 takes a free one.
        minutes: when the page closes by itself. None serves until Ctrl-C.
        prompt_characters: the longest prompt that the page accepts.
        votes_per_voter: how many pairs one browser may vote on.
        queue: how many images may wait for the network at once. Who comes later is asked to try again.
    """

    shown: dict[str, tuple[Steps, ...] | None] = Field(min_length=1)
    voted: dict[str, tuple[Steps, ...] | None] = Field(min_length=1)
    prompts: tuple[Prompt, ...] | None = None
    question: str = Field(default="Which image shows the prompt better?", min_length=1, max_length=200)
    host: str = Field(default="127.0.0.1", min_length=1)
    port: int = Field(default=8410, ge=0, le=65535)
    minutes: float | None = Field(default=None, gt=0)
    prompt_characters: int = Field(default=300, ge=1, le=1000)
    votes_per_voter: Count = 200
    queue: Count = 32

    @field_validator("shown", "voted")
    @classmethod
    def _models_and_steps(cls, models: dict[str, tuple[int, ...] | None]) -> dict[str, tuple[int, ...] | None]:
        for name, steps in models.items():
            if not re.fullmatch("[A-Za-z0-9_]+", name):
                raise ValueError(f"'{name}' is no model; use teacher, or a LoRA's name without lora_, such as k4")
            if steps is not None and (not steps or len(set(steps)) != len(steps)):
                raise ValueError(f"{name}: give each number of steps once, and one at least")
            if steps is not None and name != TEACHER and max(steps) > TCD_POINTS:
                raise ValueError(f"{name}: {max(steps)} steps are more than a LoRA has; use {TCD_POINTS} at most")
        return models

    @field_validator("shown")
    @classmethod
    def _some_shown(cls, models: dict[str, tuple[int, ...] | None]) -> dict[str, tuple[int, ...] | None]:
        if not rows(models):
            raise ValueError("every model is left out; add one with its numbers of steps")
        return models

    @field_validator("voted")
    @classmethod
    def _a_pair(cls, models: dict[str, tuple[int, ...] | None]) -> dict[str, tuple[int, ...] | None]:
        if len(rows(models)) < 2:
            raise ValueError("a vote is between two contenders; add a model or a number of steps")
        return models

    @field_validator("prompts")
    @classmethod
    def _some(cls, prompts: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if prompts is not None and not any(prompt.strip() for prompt in prompts):
            raise ValueError("there is no prompt; add one, or set it to null for the captions of the test split")
        return prompts

    def loras(self) -> list[str]:
        """The names of the LoRAs that are shown or voted on."""
        return [name for name in dict.fromkeys(name for name, _ in [*rows(self.shown), *rows(self.voted)]) if name != TEACHER]

    def check(self, num_train_timesteps: int) -> None:
        """Raises UserError for a number of steps that the teacher's schedule of so many timesteps has not."""
        for key in ("shown", "voted"):
            most = max((steps for _, steps in rows(getattr(self, key))), default=1)
            if most > num_train_timesteps:
                raise UserError(f"arena.{key}: {most} steps are more than the teacher's {num_train_timesteps} timesteps; lower it.")


def rows(models: Mapping[str, tuple[int, ...] | None]) -> list[tuple[str, int]]:
    """Every model with every one of its numbers of steps, in order. A model whose steps are null is left out."""
    return [(name, steps) for name, numbers in models.items() for steps in numbers or ()]
