"""What tests of the arena share: contenders, votes, and a LoRA."""

from __future__ import annotations

import json
import secrets
from typing import Any

import torch

from hypersd_pipeline.arena.contenders import Contender
from hypersd_pipeline.arena.votes import Vote
from hypersd_pipeline.models.contract import Contract
from hypersd_pipeline.models.lora import LoRA
from hypersd_pipeline.models.teacher import Teacher


def contender(model: str, steps: int) -> Contender:
    """One that only its name tells from others."""
    return Contender(model, Contract(steps), 1.0, f"key of {model} {steps}")


def vote(left: Contender, right: Contender, choice: Any, voter: str = "ann", pair: str | None = None) -> Vote:
    """A vote on a pair of its own, unless that is given."""
    return Vote(pair or secrets.token_hex(16), voter, "a fox", "7", left.name, left.key, right.name, right.key, choice)


def lora(teacher: Teacher, rank: int, ending: str, seed: int, **contract: Any) -> LoRA:
    """A random LoRA on the modules with a name that ends so, linear ones or convolutions."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in teacher.backbone.module.named_parameters():
        if name.endswith(f"{ending}.weight"):
            rows, *columns = weight.shape
            base = f"unet.{name.removesuffix('.weight')}"
            tensors[f"{base}.lora_A.weight"] = torch.randn(rank, *columns, generator=generator)
            tensors[f"{base}.lora_B.weight"] = torch.randn(rows, rank, *(1 for _ in columns[1:]), generator=generator)
    told = {**json.loads(Contract(4).to_json(teacher.scheduler_config())), **contract}
    return LoRA(tensors, {"sampling_contract": json.dumps(told)})
