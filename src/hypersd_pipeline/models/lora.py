"""LoRA weights as a value: what stages hand on and what diffusers loads."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from hypersd_pipeline.diffusion.grids import tcd_timesteps, trailing_timesteps
from hypersd_pipeline.errors import UserError

PREFIX = "unet."


@dataclass(frozen=True)
class LoRA:
    """Low-rank weights in diffusers' PEFT format.

    Attributes:
        tensors: ``unet.<module>.lora_A.weight`` and ``...lora_B.weight``. The scale is 1 (alpha equals the
            rank), so that no loader can get it wrong.
        metadata: strings; ``sampling_contract`` is JSON (see `Contract`).
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The rank of the first pair."""
        return next(len(v) for k, v in self.tensors.items() if k.endswith("lora_A.weight"))

    def modules(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Module name in the UNet -> ``(A, B)``.

        Raises:
            UserError: a key is not a UNet LoRA's, or half of a pair is missing.
        """
        pairs: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self.tensors.items():
            name, _, half = key.removeprefix(PREFIX).rpartition(".lora_")
            if not key.startswith(PREFIX) or half not in ("A.weight", "B.weight"):
                raise UserError(
                    f"LoRA key {key!r} is not of a UNet in diffusers' PEFT format; convert the file with diffusers' save_lora_weights."
                )
            pairs.setdefault(name, {})[half[0]] = tensor
        incomplete = [name for name, pair in pairs.items() if len(pair) != 2]
        if incomplete:
            raise UserError(
                f"LoRA module {incomplete[0]!r} has only one of lora_A and lora_B; the file is damaged, fetch or train it again."
            )
        return {name: (pair["A"], pair["B"]) for name, pair in pairs.items()}


Grid = Literal["trailing", "tcd"]


@dataclass(frozen=True)
class Contract:
    """How a LoRA wants to be sampled, as far as it differs; without guidance in any case.

    Attributes:
        steps: its own number. eta: TCDScheduler's; 0 is DDIM. grid: of timesteps; ``tcd`` is TCDScheduler's own.
        first: the one timestep of one-step sampling, where it is not ``T - 1`` (``timesteps=[800]``); more steps have their grid.
        only: the same for a model that knows no other step (the dedicated UNet, with LCMScheduler).
    """

    steps: int
    eta: float = 0.0
    grid: Grid = "trailing"
    first: int | None = None
    only: int | None = None

    def timesteps(self, steps: int, num_train_timesteps: int) -> Tensor:
        """The falling grid of so many steps, int64 ``[steps]``."""
        if self.only is not None:
            return torch.tensor([self.only])
        if self.first is not None and steps == 1:
            return torch.tensor([self.first])
        return {"trailing": trailing_timesteps, "tcd": tcd_timesteps}[self.grid](steps, num_train_timesteps)

    def to_json(self, schedule_config: dict[str, Any], prediction_type: str) -> str:
        """As it travels with the file: scheduler (TCDScheduler for its grid or an eta, LCMScheduler for ``only``) and its config."""
        scheduler = {
            **schedule_config,
            "prediction_type": prediction_type,
            "timestep_spacing": "trailing",
            "set_alpha_to_one": False,
            "clip_sample": False,
            "steps_offset": 1,
        }
        stochastic = "TCDScheduler" if self.eta or self.grid == "tcd" else "DDIMScheduler"
        contract = {
            "scheduler": stochastic if self.only is None else "LCMScheduler",
            "scheduler_config": scheduler,
            "steps": self.steps,
            "guidance_scale": 1.0,
            **({"timestep_spacing": self.grid, "eta": self.eta} if self.only is None else {"timesteps": [self.only]}),
            **({} if self.first is None else {"one_step_timesteps": [self.first]}),
        }
        return json.dumps(contract, sort_keys=True)

    @classmethod
    def of(cls, lora: LoRA) -> Contract:
        """The contract of a LoRA.

        Raises:
            UserError: it carries none that can be read, or asks for guidance.
        """
        try:
            contract = json.loads(lora.metadata["sampling_contract"])
            steps, guidance = int(contract["steps"]), float(contract["guidance_scale"])
            eta, grid = float(contract.get("eta", 0.0)), str(contract.get("timestep_spacing", "trailing"))
            first, only = (int(contract[name][0]) if name in contract else None for name in ("one_step_timesteps", "timesteps"))
        except (KeyError, ValueError, TypeError) as error:
            raise UserError("LoRA: its metadata has no readable sampling_contract; train it again with this project.") from error
        if guidance > 1:
            raise UserError(
                f"LoRA: its sampling_contract asks for guidance_scale {guidance}, few-step LoRAs are evaluated without; train it "
                f"again with this project."
            )
        return cls(steps, eta, "tcd" if grid == "tcd" else "trailing", first, only)


def lora_key(lora: LoRA | None) -> str | None:
    """A hash of the LoRA's weights, the same on every machine; None for none."""
    if lora is None:
        return None
    digest = hashlib.sha256()
    for name, tensor in sorted(lora.tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _delta(a: Tensor, b: Tensor) -> Tensor:
    """``B A`` in the shape of the weight: linear ``[out, in]``, convolution ``[out, in, kh, kw]`` (B is 1 x 1)."""
    if a.ndim == 4:
        return torch.einsum("or,rihw->oihw", b[:, :, 0, 0], a)
    return b @ a


@torch.no_grad()
def merge_lora(unet: torch.nn.Module, lora: LoRA, weight: float = 1.0) -> None:
    """Add ``weight * B A`` to the UNet's own weights, in place.

    Raises:
        UserError: the LoRA belongs to another architecture.
    """
    parameters = dict(unet.named_parameters())
    for name, (a, b) in lora.modules().items():
        target = parameters.get(f"{name}.weight")
        delta = _delta(a.float(), b.float())
        if target is None or target.shape != delta.shape:
            raise UserError(f"LoRA module {name!r} does not fit this UNet; use the LoRA with the teacher it was trained on.")
        target.add_((weight * delta).to(target))


def combine(first: LoRA, second: LoRA, weight: float) -> LoRA:
    """One LoRA for ``first + weight * second``: ranks stacked, ``A = [A1; A2]`` and ``B = [B1, weight B2]``; metadata of ``first``.

    Every module gets the sum of both ranks, with zeros where one LoRA does not change it: loaders take one alpha for all modules, so that
    with ranks that differ the scale would not be 1 everywhere.
    """
    ones, twos = first.modules(), second.modules()
    tensors: dict[str, Tensor] = {}
    for name in dict.fromkeys([*ones, *twos]):
        (a1, b1), (a2, b2) = (_half(own, other, name, rank) for own, other, rank in ((ones, twos, first.rank), (twos, ones, second.rank)))
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.cat([a1, a2])
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.cat([b1, weight * b2], dim=1)
    return LoRA(tensors, dict(first.metadata))


def _half(own: dict[str, tuple[Tensor, Tensor]], other: dict[str, tuple[Tensor, Tensor]], name: str, rank: int) -> tuple[Tensor, Tensor]:
    """The pair of a module; of zeros, in the shape that the other LoRA's pair tells, where there is none."""
    if name in own:
        return own[name]
    a, b = other[name]
    return a.new_zeros(rank, *a.shape[1:]), b.new_zeros(b.shape[0], rank, *b.shape[2:])
