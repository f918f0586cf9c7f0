"""Configuration of a distillation stage: what all stages share, and what each overrides."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from hypersd_pipeline.diffusion.grids import boundaries, check_grid, solver_grid
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.training.adversary import AdversarialConfig
from hypersd_pipeline.training.distillation import MethodConfig, StageConfig
from hypersd_pipeline.training.loop import LoopConfig

MERGED: dict[str, type[BaseModel]] = {"loop": LoopConfig, "adversarial": AdversarialConfig}
"""Sections that a stage overrides key by key."""


class TscdDefaults(MethodConfig):
    """What all stages share (``tscd`` in conf); each stage's own section overrides it. Attributes: `MethodConfig`'s."""


class StageOverrides(BaseModel):
    """One stage's section: ``segments`` and whatever differs from the shared values; ``loop`` and ``adversarial`` are merged key by key."""

    model_config = ConfigDict(extra="allow", frozen=True)

    segments: Literal[8, 4, 2, 1]

    @model_validator(mode="after")
    def _known_keys(self) -> StageOverrides:
        own = self.model_extra or {}
        if "lora" in own:
            raise ValueError("lora is shared by all stages, which hand on their weights; set it in the section tscd")
        sections: list[tuple[str, Any, type[BaseModel]]] = [("stage", own, MethodConfig)]
        sections += [(name, own[name], model) for name, model in MERGED.items() if name in own]
        for name, given, model in sections:
            if not isinstance(given, dict):
                raise ValueError(f"{name} is not a section of keys but {given!r}")
            if unknown := sorted(set(given) - set(model.model_fields)):
                raise ValueError(f"{name} has no key {unknown[0]!r}; it has {', '.join(model.model_fields)}")
        return self

    def check_with(self, defaults: TscdDefaults) -> None:
        """Complete this stage and check it, before anything runs.

        Raises:
            ValidationError: a value is out of range. UserError: the grid misses a boundary, or the first stage asks for a previous one.
        """
        config = self.apply(defaults)
        check_grid(solver_grid(config.solver_points), boundaries(config.segments))
        if config.segments == 8:
            check_previous(config, has_previous=False)

    def apply(self, defaults: TscdDefaults) -> StageConfig:
        """The complete stage configuration."""
        own = self.model_dump()
        shared = defaults.model_dump()
        merged = {name: {**shared[name], **own.get(name, {})} for name in MERGED}
        return StageConfig.model_validate({**shared, **own, **merged})


def check_previous(config: StageConfig, *, has_previous: bool) -> None:
    """Raises UserError for ``teacher: previous_stage`` without a stage before."""
    if config.teacher == "previous_stage" and not has_previous:
        raise UserError(
            f"stage.teacher (segments: {config.segments}): previous_stage needs a stage before this one; use base for the first stage."
        )
