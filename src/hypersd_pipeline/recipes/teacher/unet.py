"""Train the shipped teacher's denoiser together with its text encoder, on the autoencoder's latents."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hypersd_pipeline.diffusion.process import Process
from hypersd_pipeline.files import fingerprint
from hypersd_pipeline.models.backbones.unet import small_unet
from hypersd_pipeline.objectives.denoising import epsilon_loss
from hypersd_pipeline.recipes.teacher.config import UnetConfig
from hypersd_pipeline.training.checkpoints import CheckpointStore
from hypersd_pipeline.training.ema import ema_update
from hypersd_pipeline.training.loop import LoopConfig, MetricSink, make_accelerator, train

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

SCHEDULER_CONFIG = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "trailing",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}


@dataclass
class TextToLatent:
    """What makes latents of a text: UNet, text encoder and tokenizer."""

    unet: torch.nn.Module
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer


def build_tokenizer(captions: Sequence[str], config: UnetConfig) -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer with a vocabulary learned from the captions, in which every lower-case word stays representable."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    start, end = "<|startoftext|>", "<|endoftext|>"
    clip = CLIPTokenizer()  # for CLIP's own normaliser and pre-tokeniser
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=end))
    bpe.normalizer, bpe.pre_tokenizer = clip.backend_tokenizer.normalizer, clip.backend_tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary,
        special_tokens=[start, end, *(letter + "</w>" for letter in alphabet)],  # numbered first, or their order is random in each process
        end_of_word_suffix="</w>",
        show_progress=False,
        initial_alphabet=alphabet,
        min_frequency=2,
    )
    single = [chr(c) for c in range(33, 127)] * 2  # so that each ASCII character exists as a word's end
    bpe.train_from_iterator([*captions, *single], trainer)
    state = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in state["merges"]]
    return CLIPTokenizer(vocab=state["vocab"], merges=merges, model_max_length=config.max_tokens)


def build_denoiser(tokenizer: CLIPTokenizer, config: UnetConfig, latent_channels: int, latent_size: int) -> TextToLatent:
    """Randomly initialised UNet and text encoder in Stable Diffusion's layout."""
    from transformers import CLIPTextConfig, CLIPTextModel

    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.text_width,
            intermediate_size=4 * config.text_width,
            projection_dim=config.text_width,
            num_hidden_layers=config.text_layers,
            num_attention_heads=config.text_heads,
            max_position_embeddings=config.max_tokens,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = small_unet(
        latent_channels=latent_channels,
        latent_size=latent_size,
        text_width=config.text_width,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        attention_head_dim=config.attention_head_dim,
        norm_num_groups=config.norm_num_groups,
    )
    return TextToLatent(unet, text, tokenizer)


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Token numbers, int64 ``[n, max_tokens]``."""
    return tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt").input_ids


def train_denoiser(
    latents: tuple[Tensor, Tensor],
    captions: Sequence[str],
    config: UnetConfig,
    data_key: str,
    checkpoints: CheckpointStore,
    metrics: MetricSink,
) -> TextToLatent:
    """Train the UNet together with its text encoder.

    Args:
        latents: posterior mean and std, two float32 ``[n, c, h, w]``.
        captions: one each.
        data_key: names latents and captions: a checkpoint made on other ones is not continued.

    Returns:
        The averaged weights on the CPU, with the tokenizer.
    """
    tokenizer = build_tokenizer(captions, config)
    tokens = tokenize(tokenizer, captions), tokenize(tokenizer, [""])
    torch.manual_seed(config.loop.seed)
    model = build_denoiser(tokenizer, config, latents[0].shape[1], latents[0].shape[2])
    network = torch.nn.ModuleDict({"unet": model.unet, "text": model.text_encoder})
    shape = config.model_dump(mode="json", exclude={"loop", "refine_loop"})
    key = fingerprint("unet", {**shape, "loop": config.loop.identity()}, data_key)
    network = _train_loop(network, latents, tokens, config, config.loop, key, checkpoints, metrics)
    if config.refine_loop is not None:
        key = fingerprint("unet refined", key, config.refine_loop.identity())
        first = config.loop.steps
        network = _train_loop(
            network, latents, tokens, config, config.refine_loop, key, checkpoints, lambda values, step: metrics(values, first + step)
        )
    return TextToLatent(network["unet"], network["text"], tokenizer)


def _train_loop(
    network: torch.nn.ModuleDict,
    latents: tuple[Tensor, Tensor],
    tokens: tuple[Tensor, Tensor],
    config: UnetConfig,
    loop: LoopConfig,
    key: str,
    checkpoints: CheckpointStore,
    metrics: MetricSink,
) -> torch.nn.ModuleDict:
    """One training of UNet and text encoder, with ``tokens`` of the captions and of "". Returns the averaged weights."""
    accelerator = make_accelerator(loop)
    device = accelerator.device
    (mean, std), (ids, empty) = latents, tokens
    network = network.to(device).train().requires_grad_(True)
    average = copy.deepcopy(network).requires_grad_(False)
    parameters, averaged = list(network.parameters()), list(average.parameters())
    process = Process.from_config(SCHEDULER_CONFIG)
    batch = loop.batch_size // loop.accumulate

    def loss_fn(generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        picks = torch.randint(len(mean), (batch,), generator=generator)
        x0 = mean[picks] + std[picks] * torch.randn(batch, *mean.shape[1:], generator=generator)
        z = torch.randn(x0.shape, generator=generator)
        t = torch.randint(process.num_train_timesteps, (batch,), generator=generator)
        dropped = torch.rand(batch, 1, generator=generator) < config.caption_dropout
        embeds = network["text"](torch.where(dropped, empty, ids[picks]).to(device)).last_hidden_state
        x0, z, t = x0.to(device), z.to(device), t.to(device)
        output = network["unet"](process.add_noise(x0, z, t), t, encoder_hidden_states=embeds, return_dict=False)[0]
        return epsilon_loss(output, z, t, process, config.min_snr_gamma), {}

    train(
        "unet",
        parameters=parameters,
        loss_fn=loss_fn,
        config=loop,
        state={"network": network, "average": average},
        key=key,
        checkpoints=checkpoints,
        metrics=metrics,
        accelerator=accelerator,
        after_update=lambda: ema_update(averaged, parameters, config.ema_decay),
    )
    return average.cpu().eval()
