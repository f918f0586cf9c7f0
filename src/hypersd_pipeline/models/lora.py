"""LoRA weights as a value: what stages hand on and what diffusers loads."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.tensors import is_finite

_KEY = re.compile(r"(?P<component>unet|transformer)\.(?P<module>.+)\.lora_(?P<half>[AB])\.weight")


@dataclass(frozen=True)
class LoRA:
    """Low-rank weights in diffusers' PEFT format.

    Attributes:
        tensors: ``unet.<module>.lora_A.weight`` and ``...lora_B.weight``. The scale is 1 (alpha equals the
            rank), so that no loader can get it wrong.
        metadata: strings. ``sampling_contract`` is JSON (see `models.contract.Contract`).
        judge: the head of the stage's discriminator, where the next stage is to start from it. No part of the LoRA for anybody else.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    judge: dict[str, Tensor] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The rank of the first pair."""
        return next(len(v) for k, v in self.tensors.items() if k.endswith("lora_A.weight"))

    @property
    def component(self) -> str:
        """The network's name in diffusers' pipelines, which begins every key: ``unet``."""
        return next(iter(self.tensors)).partition(".")[0]

    def modules(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Module name in the network -> ``(A, B)``.

        Raises:
            UserError: a key is not one of diffusers' LoRA keys, or half of a pair is missing.
        """
        pairs: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self.tensors.items():
            match = _KEY.fullmatch(key)
            if match is None and key.endswith(".alpha"):
                raise UserError(
                    f"LoRA key {key!r}: a scale of its own is not supported; multiply lora_B by alpha / rank and leave the key out."
                )
            if match is None:
                raise UserError(f"LoRA key {key!r} is not in diffusers' PEFT format; convert the file with diffusers' save_lora_weights.")
            pairs.setdefault(match["module"], {})[match["half"]] = tensor
        if not pairs:
            raise UserError("the LoRA holds no tensors; the file is damaged, fetch or train it again.")
        incomplete = [name for name, pair in pairs.items() if len(pair) != 2]
        if incomplete:
            raise UserError(
                f"LoRA module {incomplete[0]!r} has only one of lora_A and lora_B; the file is damaged, fetch or train it again."
            )
        return {name: (pair["A"], pair["B"]) for name, pair in pairs.items()}

    def check(self, shapes: Mapping[str, tuple[int, ...]] | None = None) -> None:
        """Check everything that can be told without computing.

        Args:
            shapes: names and shapes of the weights of the network that it belongs to. None where that is not known.

        Raises:
            UserError: a key, a shape or a value is not a LoRA's or does not fit the network, or the scale is not 1 everywhere.
        """
        pairs = self.modules()
        _check_scale(self.metadata, self.rank)
        for name, (a, b) in pairs.items():
            if (
                a.ndim not in (2, 4)
                or a.ndim != b.ndim
                or b.shape[1] != len(a)
                or b.shape[2:].numel() != 1
                or not a.numel()
                or not b.numel()
            ):
                raise UserError(f"LoRA module {name!r}: lora_A {list(a.shape)} and lora_B {list(b.shape)} are no pair; train it again.")
            if len(a) != self.rank:
                raise UserError(
                    f"LoRA module {name!r} has rank {len(a)}, but others have {self.rank}; loaders take one alpha for all, so use one rank."
                )
            if not (is_finite(a) and is_finite(b)):
                raise UserError(f"LoRA module {name!r} has values that are NaN or infinite; fetch or train it again.")
            if shapes is not None and shapes.get(f"{name}.weight") != (len(b), *a.shape[1:]):
                raise UserError(
                    f"LoRA module {name!r} does not fit the teacher's network; use the LoRA with the teacher it was trained on."
                )


def _check_scale(metadata: Mapping[str, str], rank: int) -> None:
    """Raises UserError where diffusers' own metadata says another alpha than the rank."""
    try:
        told = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        values = {name.rpartition(".")[2]: value for name, value in told.items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError("the LoRA's lora_adapter_metadata cannot be read; save it again with diffusers' save_lora_weights.") from error
    alpha = values.get("lora_alpha", rank)
    if alpha != rank or values.get("alpha_pattern") or values.get("use_rslora"):
        raise UserError(
            f"the LoRA's alpha is {alpha!r} and its rank {rank}, so that its scale is not 1; train or convert it with alpha = rank."
        )


def lora_key(lora: LoRA | None) -> str | None:
    """A hash of the LoRA's weights, the same on every machine. None for none."""
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
def merge_lora(network: torch.nn.Module, lora: LoRA, weight: float = 1.0) -> None:
    """Add ``weight * B A`` to the network's own weights, in place.

    Raises:
        UserError: the LoRA belongs to another architecture.
    """
    parameters = dict(network.named_parameters())
    for name, (a, b) in lora.modules().items():
        target = parameters.get(f"{name}.weight")
        delta = _delta(a.float(), b.float())
        if target is None or target.shape != delta.shape:
            raise UserError(f"LoRA module {name!r} does not fit this network; use the LoRA with the teacher it was trained on.")
        target.add_((weight * delta).to(target))


def combine(first: LoRA, second: LoRA, weight: float, rank: int | None = None) -> LoRA:
    """One LoRA for ``first + weight * second``: ranks stacked, ``A = [A1; A2]`` and ``B = [B1, weight B2]``. Metadata of ``first``.

    Every module gets the sum of both ranks, with zeros where one LoRA does not change it: loaders take one alpha for all modules, so that
    with ranks that differ the scale would not be 1 everywhere.

    Args:
        rank: of the result, at most the sum of both. Each module then has the closest weights of that rank (`truncated`). None stacks.

    Raises:
        UserError: ``rank`` is higher than the sum of both.
    """
    if rank is not None and rank > first.rank + second.rank:
        raise UserError(f"start_rank is {rank}, more than the {first.rank} + {second.rank} of both LoRAs; lower it.")
    ones, twos = first.modules(), second.modules()
    tensors: dict[str, Tensor] = {}
    for name in dict.fromkeys([*ones, *twos]):
        (a1, b1), (a2, b2) = (_half(own, other, name, rank) for own, other, rank in ((ones, twos, first.rank), (twos, ones, second.rank)))
        a, b = torch.cat([a1, a2]), torch.cat([b1, weight * b2], dim=1)
        a, b = (a, b) if rank is None else truncated(a, b, rank)
        tensors[f"{first.component}.{name}.lora_A.weight"], tensors[f"{first.component}.{name}.lora_B.weight"] = a, b
    return LoRA(tensors, dict(first.metadata))


def truncated(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors of the matrix of ``rank`` that is closest to ``B A`` (its truncated singular value decomposition).

    The singular values are shared evenly. A rank without a singular value keeps a row of A that is not zero, so that it can learn.

    Args:
        a: ``[r, in]`` or ``[r, in, kh, kw]``. b: ``[out, r]`` or ``[out, r, 1, 1]``.
    """
    wide, tall = a.flatten(1).double(), b.flatten(1).double()
    q_b, r_b = torch.linalg.qr(tall)
    q_a, r_a = torch.linalg.qr(wide.T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T)
    found = min(rank, len(s))
    root, there = s[:found].sqrt(), s[:found] > 1e-6 * s[0]
    first = (torch.where(there, root, 1.0).unsqueeze(1) * v[:found]) @ q_a.T
    second = q_b @ (u[:, :found] * torch.where(there, root, 0.0))
    new_a, new_b = wide.new_zeros(rank, wide.shape[1]), tall.new_zeros(len(tall), rank)
    new_a[:found], new_b[:, :found] = first, second
    return new_a.reshape(rank, *a.shape[1:]).to(a), new_b.reshape(len(b), rank, *b.shape[2:]).to(b)


def _half(own: dict[str, tuple[Tensor, Tensor]], other: dict[str, tuple[Tensor, Tensor]], name: str, rank: int) -> tuple[Tensor, Tensor]:
    """The pair of a module. Of zeros, in the shape that the other LoRA's pair tells, where there is none."""
    if name in own:
        return own[name]
    a, b = other[name]
    return a.new_zeros(rank, *a.shape[1:]), b.new_zeros(b.shape[0], rank, *b.shape[2:])
