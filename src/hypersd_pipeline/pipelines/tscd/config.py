"""Configuration of a TSCD stage."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from hypersd_pipeline.config import Strict
from hypersd_pipeline.diffusion.grids import boundaries, check_grid, solver_grid
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.training.loop import LoopConfig


class LoraConfig(Strict):
    """Where the LoRA sits.

    Attributes:
        rank: of every pair; alpha equals it.
        target_modules: module-name endings.
    """

    rank: int = Field(ge=1)
    target_modules: tuple[str, ...] = Field(min_length=1)


class StageConfig(Strict):
    """One stage, complete.

    Attributes:
        segments: k. solver_points: N, a grid that contains every segment boundary (40 does for 8, 4, 2 and 1).
        teacher: whose step drives the solver: the original model with guidance, or the previous stage's LoRA, where guidance is baked in.
        guidance: range of the teacher's guidance scale, drawn uniformly per sample.
        offset_noise: strength of the noise perturbation.
        ema_decay: mu of the target network.
        gradient_checkpointing: less memory for one more forward pass.
        lora, loop: see there.
    """

    segments: Literal[8, 4, 2, 1]
    solver_points: int = Field(ge=1)
    teacher: Literal["base", "previous_stage"]
    guidance: tuple[float, float]
    offset_noise: float = Field(ge=0)
    ema_decay: float = Field(ge=0, lt=1)
    gradient_checkpointing: bool = False
    lora: LoraConfig
    loop: LoopConfig

    @model_validator(mode="after")
    def _rising_guidance(self) -> StageConfig:
        if not 1 <= self.guidance[0] <= self.guidance[1]:
            raise ValueError(f"guidance must be a rising pair of scales from 1 on, not {list(self.guidance)}")
        return self


class TscdDefaults(Strict):
    """What all stages share (``tscd`` in conf); each stage's own file section overrides it.

    Attributes:
        as in `StageConfig`.
    """

    solver_points: int = Field(default=40, ge=1)
    teacher: Literal["base", "previous_stage"] = "base"
    guidance: tuple[float, float]
    offset_noise: float = Field(default=0.05, ge=0)
    ema_decay: float = Field(default=0.95, ge=0, lt=1)
    gradient_checkpointing: bool = False
    lora: LoraConfig
    loop: LoopConfig


class StageOverrides(Strict):
    """One stage's section: ``segments`` and whatever differs from the shared values; ``loop`` is merged key by key."""

    segments: Literal[8, 4, 2, 1]
    solver_points: int | None = Field(default=None, ge=1)
    teacher: Literal["base", "previous_stage"] | None = None
    guidance: tuple[float, float] | None = None
    offset_noise: float | None = Field(default=None, ge=0)
    ema_decay: float | None = Field(default=None, ge=0, lt=1)
    gradient_checkpointing: bool | None = None
    loop: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _known_loop_keys(self) -> StageOverrides:
        unknown = set(self.loop) - set(LoopConfig.model_fields)
        if unknown:
            raise ValueError(f"loop has no key {sorted(unknown)[0]!r}; it has {', '.join(LoopConfig.model_fields)}")
        return self

    def check_with(self, defaults: TscdDefaults) -> None:
        """Complete this stage and check its grid, before anything runs.

        Raises:
            ValidationError: a value is out of range. UserError: the grid misses a boundary, or the first stage asks for a previous one.
        """
        config = self.apply(defaults)
        check_grid(solver_grid(config.solver_points), boundaries(config.segments))
        if config.segments == 8 and config.teacher == "previous_stage":
            raise UserError("tscd_k8.stage.teacher: previous_stage needs a stage before this one; use base for the first stage.")

    def apply(self, defaults: TscdDefaults) -> StageConfig:
        """The complete stage configuration."""
        own = self.model_dump(exclude_none=True, exclude={"loop"})
        shared = defaults.model_dump()
        return StageConfig.model_validate({**shared, **own, "loop": {**shared["loop"], **self.loop}})
