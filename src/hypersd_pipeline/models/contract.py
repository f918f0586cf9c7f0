"""The sampling contract: how a LoRA or a UNet wants to be sampled. It travels with the file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hypersd_pipeline.diffusion.grids import TCD_POINTS, tcd_timesteps, trailing_timesteps
from hypersd_pipeline.diffusion.process import MAX_TIMESTEPS
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.lora import LoRA

Grid = Literal["trailing", "tcd"]


@dataclass(frozen=True)
class Contract:
    """How a LoRA wants to be sampled, as far as it differs. Without guidance in any case.

    Attributes:
        steps: its own number. eta: TCDScheduler's; 0 is DDIM. grid: of timesteps. ``tcd`` is TCDScheduler's own.
        one_step_timestep: the one timestep of one-step sampling, where it is not ``T - 1`` (``timesteps=[800]``).
        only_timestep: the same for a model that knows no other step (the dedicated UNet, with LCMScheduler).
    """

    steps: int
    eta: float = 0.0
    grid: Grid = "trailing"
    one_step_timestep: int | None = None
    only_timestep: int | None = None

    def timesteps(self, steps: int, num_train_timesteps: int) -> Tensor:
        """The falling grid of so many steps, int64 ``[steps]``."""
        if self.only_timestep is not None:
            return torch.tensor([self.only_timestep])
        if self.one_step_timestep is not None and steps == 1:
            return torch.tensor([self.one_step_timestep])
        return {"trailing": trailing_timesteps, "tcd": tcd_timesteps}[self.grid](steps, num_train_timesteps)

    def to_json(self, scheduler_config: Mapping[str, Any]) -> str:
        """As it travels with the file: scheduler (TCDScheduler for its grid or an eta, LCMScheduler for ``only_timestep``) and its config.

        Args:
            scheduler_config: of the teacher, with its prediction type (`Teacher.scheduler_config`).
        """
        scheduler = {
            **scheduler_config,
            "timestep_spacing": "trailing",
            "set_alpha_to_one": False,
            "clip_sample": False,
            "steps_offset": 1,
        }
        stochastic = "TCDScheduler" if self.eta or self.grid == "tcd" else "DDIMScheduler"
        contract = {
            "scheduler": stochastic if self.only_timestep is None else "LCMScheduler",
            "scheduler_config": scheduler,
            "steps": self.steps,
            "guidance_scale": 1.0,
            **({"timestep_spacing": self.grid, "eta": self.eta} if self.only_timestep is None else {"timesteps": [self.only_timestep]}),
            **({} if self.one_step_timestep is None else {"one_step_timesteps": [self.one_step_timestep]}),
        }
        return json.dumps(contract, sort_keys=True)

    @classmethod
    def of(cls, lora: LoRA) -> Contract:
        """The contract of a LoRA.

        Raises:
            UserError: it carries none that can be read, or asks for guidance.
        """
        return cls.read(lora.metadata.get("sampling_contract"))

    @classmethod
    def read(cls, text: str | None) -> Contract:
        """The contract that `to_json` wrote.

        Raises:
            UserError: it cannot be read, or asks for guidance.
        """
        try:
            contract = json.loads(text or "")
            grid_name = contract.get("timestep_spacing", "trailing")
            steps, guidance = int(contract["steps"]), float(contract["guidance_scale"])
            if isinstance(contract["steps"], bool) or steps != float(contract["steps"]) or not math.isfinite(guidance):
                raise ValueError("steps or guidance_scale is no number")
            eta = float(contract.get("eta", 0.0))
            first, only = (int(contract[name][0]) if name in contract else None for name in ("one_step_timesteps", "timesteps"))
        except (LookupError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise UserError("LoRA: its metadata has no readable sampling_contract; train it again with this project.") from error
        if guidance > 1:
            raise UserError(
                f"LoRA: its sampling_contract asks for guidance_scale {guidance}, few-step LoRAs are evaluated without; train it "
                f"again with this project."
            )
        found = cls(steps, eta, "tcd" if grid_name == "tcd" else "trailing", first, only)
        found.check()
        return found

    def check(self, num_train_timesteps: int = MAX_TIMESTEPS) -> None:
        """Raises UserError for numbers that no sampler has, or that the teacher's schedule of so many timesteps has not."""
        most = min(1000, num_train_timesteps, TCD_POINTS if self.grid == "tcd" else num_train_timesteps)
        if not 1 <= self.steps <= most:
            raise UserError(f"LoRA: its sampling_contract has {self.steps} steps, not 1 to {most}; train it again with this project.")
        if not 0 <= self.eta <= 1:
            raise UserError(f"LoRA: its sampling_contract has an eta of {self.eta}, not 0 to 1; train it again with this project.")
        for told in (self.one_step_timestep, self.only_timestep):
            if told is not None and not 0 < told < num_train_timesteps:
                raise UserError(
                    f"LoRA: its sampling_contract has the timestep {told}, but the teacher's end at {num_train_timesteps - 1}; "
                    f"use it with the teacher that it was trained on."
                )


def sampling_call(contract: Mapping[str, Any], steps: int | None = None) -> dict[str, Any]:
    """The arguments of a call of diffusers' pipeline.

    Args:
        contract: of `Contract.to_json`, read. steps: another number of them than the contract's.
    """
    steps = contract.get("steps", 4) if steps is None else steps
    guidance = float(contract.get("guidance_scale", 1.0))
    given = contract.get("one_step_timesteps", contract.get("timesteps")) if steps == 1 else None
    return {
        "num_inference_steps": steps,
        "guidance_scale": guidance if guidance > 1 else 0,  # diffusers turns guidance off for any value up to 1
        **({"eta": contract["eta"]} if "eta" in contract else {}),
        **({} if given is None else {"timesteps": given}),
    }


def sampling_arguments(contract: Mapping[str, Any], steps: int | None = None) -> str:
    """`sampling_call` as code."""
    return ", ".join(f"{name}={value}" for name, value in sampling_call(contract, steps).items())
