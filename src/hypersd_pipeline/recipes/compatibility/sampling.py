"""Sampling as users do it: diffusers' own pipelines, the LoRA by ``load_lora_weights``, and the scheduler of its contract."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.evaluation.sampling import prompt_noise
from hypersd_pipeline.metrics.config import EvaluationConfig
from hypersd_pipeline.models.lora import LoRA
from hypersd_pipeline.models.teacher import Teacher

FEW_STEPS, STYLE = "few_steps", "style"


@dataclass(frozen=True)
class Way:
    """How images are sampled.

    Attributes:
        steps: of the sampler. few_steps: with the few-step LoRA, as its contract says. Otherwise DDIM with guidance.
        controlnet, scale: a ControlNet and its conditioning scale.
        style_weight: of the style LoRA. None is without it.
    """

    steps: int
    few_steps: bool
    controlnet: Any = None
    scale: float = 1.0
    style_weight: float | None = None


class Studio:
    """One base model in diffusers' pipelines, with the few-step LoRA and at most one style LoRA loaded.

    Args:
        model: all parts loaded. lora: with its sampling contract. style: a LoRA's file.
        evaluation: its guidance scale (without the few-step LoRA), seed, batch size and precision.

    Raises:
        UserError: diffusers cannot load a LoRA into this model.
    """

    def __init__(self, model: Teacher, lora: LoRA, evaluation: EvaluationConfig, *, style: Path | None = None, key: str = "") -> None:
        self.model, self.evaluation = model, evaluation
        self.contract: Mapping[str, Any] = json.loads(lora.metadata["sampling_contract"])
        self._plain = _pipeline(model)
        _load(self._plain, dict(lora.tensors), FEW_STEPS, "lora_unified")
        if style is not None:
            _load(self._plain, str(style), STYLE, f"{key}.source")

    def sample(self, prompts: Sequence[str], way: Way, conditions: Tensor | None = None) -> Iterator[Tensor]:
        """Images of all prompts, batch by batch: ``[b, 3, r, r]`` in [0, 1], float32. The noise of a prompt is the same for all ways.

        Args:
            conditions: ``[n, 3, r, r]`` in [0, 1], where there is a ControlNet.
        """
        pipeline = self._plain if way.controlnet is None else _pipeline(self.model, way.controlnet)
        pipeline.scheduler = self._scheduler(way)
        self._use(way)
        size, side, seed = self.evaluation.batch_size, self.model.resolution, self.evaluation.seed
        for start in range(0, len(prompts), size):
            rows = range(start, min(start + size, len(prompts)))
            part = slice(rows.start, rows.stop)
            control: dict[str, Any] = {}
            if way.controlnet is not None:
                assert conditions is not None
                control = {"image": conditions[part], "controlnet_conditioning_scale": way.scale}
            noise = prompt_noise(rows, self.model.latent_shape, seed).to(self.model.device, self.model.backbone.dtype)
            with torch.inference_mode():
                with _quiet(), torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.evaluation.mixed_precision == "bf16"):
                    latents = pipeline(
                        list(prompts[part]),
                        height=side,
                        width=side,
                        latents=noise,
                        generator=_generators(rows, seed),
                        output_type="latent",  # the VAE may have another dtype than the network, which the pipeline does not expect
                        **control,
                        **self._arguments(way),
                    ).images
                yield self.model.decode(latents).cpu()

    def _arguments(self, way: Way) -> dict[str, Any]:
        """As the LoRA's card says. diffusers turns guidance off for any scale up to 1."""
        if not way.few_steps:
            return {"num_inference_steps": way.steps, "guidance_scale": self.evaluation.guidance_scale}
        told = self.contract.get("one_step_timesteps", self.contract.get("timesteps")) if way.steps == 1 else None
        grid = {"num_inference_steps": way.steps} if told is None else {"timesteps": list(told)}
        return {**grid, "guidance_scale": 0.0, **({"eta": self.contract["eta"]} if "eta" in self.contract else {})}

    def _scheduler(self, way: Way) -> Any:
        import diffusers

        if way.few_steps:
            return getattr(diffusers, self.contract["scheduler"]).from_config(self.contract["scheduler_config"])
        config = {**self.model.scheduler_config(), "timestep_spacing": "trailing", "set_alpha_to_one": False, "clip_sample": False}
        return diffusers.DDIMScheduler.from_config({**config, "steps_offset": 1})

    def _use(self, way: Way) -> None:
        weights = {**({FEW_STEPS: 1.0} if way.few_steps else {}), **({} if way.style_weight is None else {STYLE: way.style_weight})}
        if weights:
            self._plain.enable_lora()
            self._plain.set_adapters(list(weights), list(weights.values()))
        else:
            self._plain.disable_lora()


def _generators(rows: range, seed: int) -> list[torch.Generator]:
    """Of the noise that a sampler adds on its way: one for each prompt, whatever the batch size."""
    seeds = [int(np.random.SeedSequence([seed, i, 1]).generate_state(1)[0]) for i in rows]
    return [torch.Generator("cpu").manual_seed(number) for number in seeds]


def _pipeline(model: Teacher, controlnet: Any = None) -> Any:
    """diffusers' pipeline of the model's parts, with or without a ControlNet."""
    import diffusers

    parts = {"vae": model.vae, "unet": model.backbone.module, "text_encoder": model.text_encoders[0], "tokenizer": model.tokenizers[0]}
    parts["scheduler"] = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)  # replaced before anything is sampled
    if controlnet is not None:
        parts["controlnet"] = controlnet
    name = "StableDiffusion" + ("XL" if model.layout == "sdxl" else "") + ("ControlNet" if controlnet is not None else "") + "Pipeline"
    if model.layout == "sdxl":
        more = {"text_encoder_2": model.text_encoders[1], "tokenizer_2": model.tokenizers[1], "add_watermarker": False}
        more["force_zeros_for_empty_prompt"] = model.zero_unconditional
    else:
        more = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    made: Any = getattr(diffusers, name)(**parts, **more)
    made.set_progress_bar_config(disable=True)
    return made


def _load(pipeline: Any, weights: Any, name: str, key: str) -> None:
    try:
        with _quiet(), warnings.catch_warnings():
            # peft warns that a model with a second adapter has several, which is what we want
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            pipeline.load_lora_weights(weights, adapter_name=name)
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        told = " ".join(str(error).split()).rstrip(".")[:160]
        raise UserError(f"{key}: diffusers cannot load this LoRA into the base model ({told}); use a LoRA for its family.") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' warnings that a LoRA has nothing for the text encoder, and that one step begins at another timestep than T - 1."""
    found = logging.getLogger("diffusers")
    before = found.level
    found.setLevel(logging.ERROR)
    try:
        yield
    finally:
        found.setLevel(before)
