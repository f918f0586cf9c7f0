"""Contenders, which are a model with a number of steps, and the images that they make of a prompt."""

from __future__ import annotations

import functools
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from PIL import Image

from hypersd_pipeline.arena.config import TEACHER, ArenaConfig, rows
from hypersd_pipeline.diffusion.denoiser import Denoiser
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.evaluation.samples import steps_label
from hypersd_pipeline.evaluation.sampling import generate
from hypersd_pipeline.files import fingerprint
from hypersd_pipeline.metrics.config import EvaluationConfig
from hypersd_pipeline.metrics.grids import to_pil
from hypersd_pipeline.models.contract import Contract
from hypersd_pipeline.models.lora import LoRA, lora_key
from hypersd_pipeline.models.teacher import Teacher, TeacherConfig, load_teacher

KEPT = 256
"""How many images are kept in memory, so that a pair that is voted on twice is sampled once."""

LoadLora = Callable[[str], LoRA]
"""Name without ``lora_`` -> the LoRA."""


@dataclass(frozen=True)
class Contender:
    """A model with a number of steps.

    Attributes:
        model: ``teacher``, or the name of a LoRA without ``lora_``. contract: how it is sampled, ``contract.steps`` times.
        guidance: the scale, 1 for LoRAs.
        key: a hash of all that its images depend on but prompt and noise. Votes on another key are votes on another model.
    """

    model: str
    contract: Contract
    guidance: float
    key: str

    @property
    def name(self) -> str:
        """As metrics name it: ``k4_2_steps``."""
        return f"{self.model}_{self.contract.steps}_steps"

    @property
    def title(self) -> str:
        """As people read it: ``LoRA k4, 2 steps``."""
        model = "Teacher" if self.model == TEACHER else f"LoRA {self.model}"
        return f"{model}, {steps_label(self.contract.steps)}"


def contenders(
    models: Iterable[tuple[str, int]], teacher: Teacher, loras: dict[str, LoRA], evaluation: EvaluationConfig
) -> list[Contender]:
    """The contenders for models with numbers of steps. The teacher has the evaluation's guidance.

    Args:
        models: see `arena.config.rows`. loras: by name, those that ``models`` names at least.

    Raises:
        UserError: a LoRA has no readable contract, or the teacher's schedule has fewer steps than asked for.
    """
    found = []
    for model, steps in models:
        contract, guidance, weights = Contract(steps), evaluation.guidance_scale, None
        if model != TEACHER:
            contract, guidance, weights = replace(Contract.of(loras[model]), steps=steps), 1.0, lora_key(loras[model])
        contract.check(teacher.process.num_train_timesteps)
        parts = [teacher.content_hash(part) for part in ("backbone", "vae", "text")]  # type: ignore[arg-type]
        key = fingerprint(*parts, teacher.resolution, weights, asdict(contract), guidance, evaluation.mixed_precision)
        found.append(Contender(model, contract, guidance, key))
    return found


def contenders_of(arena: ArenaConfig, teacher: TeacherConfig, loras: LoadLora, evaluation: EvaluationConfig) -> list[Contender]:
    """Those that are voted on, without loading a network."""
    found = {name: loras(name) for name, _ in rows(arena.voted) if name != TEACHER}
    return contenders(rows(arena.voted), load_teacher(teacher, parts=(), device="cpu"), found, evaluation)


class Busy(Exception):
    """More images wait for the network than `ArenaConfig.queue` allows."""


@dataclass(frozen=True)
class Sample:
    """An image, and the seconds that sampling and decoding took on this machine. Encoding the prompt is not among them."""

    image: Image.Image
    seconds: float


class Sampler:
    """One network in memory with all LoRAs as peft's adapters beside each other. Threads wait for each other.

    Args:
        teacher: loaded whole. Its network is changed in place.
        loras: by name. queue: see `ArenaConfig`.
    """

    def __init__(self, teacher: Teacher, loras: dict[str, LoRA], evaluation: EvaluationConfig, queue: int) -> None:
        self.teacher = teacher
        self.seconds: dict[str, list[float]] = {}
        """Contender's name -> seconds of each image that it made."""
        self._layers = add_loras(teacher.backbone.module, loras)
        self._bf16 = evaluation.mixed_precision == "bf16"
        self._unconditional = teacher.unconditional(1)
        self._network, self._waiting = threading.Lock(), threading.BoundedSemaphore(queue)
        self._sample = functools.lru_cache(KEPT)(self._make)

    def sample(self, contender: Contender, prompt: str, seed: int) -> Sample:
        """The image of a prompt. Contenders start from the same noise where the seed is the same.

        Raises:
            Busy: too many wait. Nothing was computed.
        """
        if not self._waiting.acquire(blocking=False):
            raise Busy
        try:
            with self._network:
                return self._sample(contender, prompt, seed)
        finally:
            self._waiting.release()

    def warm_up(self, several: Sequence[Contender]) -> None:
        """Sample once with each model, so that the first user's times are not those of a start."""
        for contender in {c.model: c for c in several}.values():
            self._make(replace(contender, contract=replace(contender.contract, steps=1)), "warm-up", 0)
        self.seconds.clear()

    def _make(self, contender: Contender, prompt: str, seed: int) -> Sample:
        cond = self.teacher.encode_prompts([prompt])
        timesteps = contender.contract.timesteps(contender.contract.steps, self.teacher.process.num_train_timesteps)
        begun = time.perf_counter()
        (image,) = generate(
            self.teacher, cond, timesteps, seed=seed, batch_size=1, denoiser=self._denoiser(contender), eta=contender.contract.eta
        )
        made = to_pil(image[0])  # on the CPU, so that all work is done
        seconds = time.perf_counter() - begun
        self.seconds.setdefault(contender.name, []).append(seconds)
        return Sample(made, seconds)

    def _denoiser(self, contender: Contender) -> Denoiser:
        for layer in self._layers:
            layer.enable_adapters(contender.model != TEACHER)
            if contender.model != TEACHER:
                layer.set_adapter(contender.model, inference_mode=True)
        denoiser = self.teacher.denoiser().in_bf16(self._bf16)
        return denoiser if contender.guidance == 1 else denoiser.guided(self._unconditional, contender.guidance)


def add_loras(network: torch.nn.Module, loras: dict[str, LoRA]) -> list[Any]:
    """Put LoRAs beside the network's weights, each as an adapter with its name, switched off. Returns peft's layers."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, lora in loras.items():
        targets = "|".join(re.escape(module) for module in lora.modules())
        with warnings.catch_warnings():
            # peft warns that a model with a second adapter has several, which is what we want
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            inject_adapter_in_model(LoraConfig(r=lora.rank, lora_alpha=lora.rank, target_modules=targets), network, name)
        weights = {key.removeprefix(f"{lora.component}."): tensor for key, tensor in lora.tensors.items()}
        loaded: Any = set_peft_model_state_dict(network, weights, adapter_name=name)
        if loaded.unexpected_keys:
            raise UserError(f"lora_{name} does not fit the teacher's network; use it with the teacher that it was trained on.")
    network.requires_grad_(False).eval()
    layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    return layers
