"""One class is all that another network needs: diffusers' PixArt transformer, trained by the project's own code."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import PixArtTransformer2DModel
from rows import Rows
from safetensors import safe_open
from torch import Tensor, nn

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.diffusion.process import Process
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.io import LoRADataset
from hypersd_pipeline.models import backbones
from hypersd_pipeline.models.adapters import AdaptedBackbone
from hypersd_pipeline.models.backbones import Backbone
from hypersd_pipeline.models.contract import Contract
from hypersd_pipeline.models.lora import LoRA, merge_lora
from hypersd_pipeline.models.one_step import read_network, write_network
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher
from hypersd_pipeline.training.checkpoints import CheckpointStore
from hypersd_pipeline.training.config import StageConfig
from hypersd_pipeline.training.cost import measure_forward
from hypersd_pipeline.training.ema import ema_update
from hypersd_pipeline.training.loop import make_accelerator, train
from hypersd_pipeline.training.stage import Stage, build_stage, needs
from hypersd_pipeline.training.terms import Context

SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT = 12


class PixArtBackbone(Backbone):
    """diffusers' ``PixArtTransformer2DModel``. A discriminator sees the tokens of the second block."""

    component = "transformer"
    class_name = "PixArtTransformer2DModel"
    size_key = "sample_size"
    encoder_modules = r"transformer_blocks\.[01]"

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        text = cond.prompt_embeds.to(self.dtype)
        output = self.module(x_t.to(self.dtype), encoder_hidden_states=text, timestep=t, return_dict=False)[0]
        return output[:, : x_t.shape[1]]  # the rest is the variance

    def features(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        network = self.module
        x, text = network.pos_embed(x_t.to(self.dtype)), network.caption_projection(cond.prompt_embeds.to(self.dtype))
        time, _ = network.adaln_single(t, None, batch_size=len(x), hidden_dtype=x.dtype)
        for block in network.transformer_blocks[:2]:
            x = block(x, encoder_hidden_states=text, timestep=time)
        return self.features_of(x)

    def feature_shape(self, latent_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        patch = self.module.config.patch_size
        return self.module.inner_dim, latent_shape[1] // patch, latent_shape[2] // patch

    def feature_module(self) -> nn.Module:
        return self.module.transformer_blocks[1]

    def features_of(self, output: Tensor) -> Tensor:
        side = isqrt(output.shape[1])  # tokens [b, h' w', C] of a square
        return output.transpose(1, 2).unflatten(2, (side, side))

    @staticmethod
    def latent_shape(config: Mapping[str, Any]) -> tuple[int, int]:
        return config["in_channels"], config["sample_size"]


def network(seed: int = 0, text: int = TEXT) -> Any:
    torch.manual_seed(seed)
    made = PixArtTransformer2DModel(
        sample_size=8, num_layers=3, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, caption_channels=text
    )
    return made.requires_grad_(False).eval()


def stage_config(encoder: str = "frozen", checkpointing: bool = False, **loop: Any) -> StageConfig:
    return StageConfig(
        terms={
            "consistency": {"segments": 2, "guidance": (2.0, 5.0)},
            "adversarial": {"weight": 0.5, "encoder": encoder, "hidden": 32},
        },
        gradient_checkpointing=checkpointing,
        lora={"rank": 2, "target_modules": TARGETS},
        loop={"steps": 1, "batch_size": 2, "learning_rate": 1e-2, **loop},
    )


def adapted(config: StageConfig) -> AdaptedBackbone:
    more = needs(config)
    trained = {**more, "trainable": ("student", *more["trainable"])}
    backbone = PixArtBackbone(network())
    if config.gradient_checkpointing:
        backbone.checkpoint_gradients()
    return AdaptedBackbone(backbone, Process.from_config(SCHEDULER), rank=2, target_modules=TARGETS, **trained)


def rows() -> Rows:
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(4, 4, 8, 8, generator=generator), torch.randn(4, 5, TEXT, generator=generator)
    return Rows(latents, Conditioning(text), Conditioning(torch.zeros(1, 5, TEXT)), ["a", "b", "c", "d"])


def stage_of(config: StageConfig, adapters: AdaptedBackbone) -> Stage:
    context = Context(
        adapters, adapters.denoiser("student"), adapters.denoiser(None), rows(), (4, 8, 8), batch=2, device=torch.device("cpu"), segments=2
    )  # type: ignore[arg-type]
    return build_stage(config, context, lambda: adapters.use("student"))


def trained(config: StageConfig, folder: Path) -> tuple[AdaptedBackbone, Stage]:
    adapters = adapted(config)
    stage, student = stage_of(config, adapters), adapters.parameters("student")
    train(
        "pixart",
        parameters=student,
        loss_fn=stage,
        config=config.loop,
        state={"adapters": adapters, **stage.state()},
        key="pixart",
        checkpoints=CheckpointStore(folder),
        metrics=lambda values, step: None,
        accelerator=make_accelerator(config.loop),
        after_update=lambda: ema_update(adapters.parameters("ema"), student, 0.5),
        companions=stage.companions(),
    )
    return adapters, stage


def batch() -> tuple[Tensor, Tensor, Conditioning]:
    found = rows()
    return found.latents[:2], torch.tensor([999, 24]), found.cond[:2]


def test_it_is_the_networks_own_output_and_features():
    backbone, (x, t, cond) = PixArtBackbone(network()), batch()
    output = backbone.module(x, encoder_hidden_states=cond.prompt_embeds, timestep=t).sample
    assert output.shape == (2, 8, 8, 8) and torch.equal(backbone(x, t, cond), output[:, :4])
    with backbone.watch_features() as seen:
        backbone(x, t, cond)
    assert torch.equal(seen[0], backbone.features(x, t, cond))  # what the whole pass computes there
    assert seen[0].shape[1:] == backbone.feature_shape((4, 8, 8)) == (16, 4, 4)
    tokens = backbone.module.transformer_blocks[1].register_forward_hook(lambda module, inputs, found: seen.append(found))
    backbone(x, t, cond)
    tokens.remove()
    assert torch.equal(seen[0][1, :, 2, 3], seen[1][1, 2 * 4 + 3])  # rows from the top, columns from the left
    assert PixArtBackbone.latent_shape(backbone.module.config) == (4, 8)
    with pytest.raises(UserError, match="match no module"):
        backbone.check_targets(["conv1"])


def test_the_encoders_adapter_sits_in_the_encoder_only():
    adapters = adapted(stage_config("adapter"))
    layers = {name for name, _, _ in adapters._pairs("discriminator")}
    assert layers == {name for name, _, _ in adapters._pairs("student") if not name.startswith("transformer_blocks.2.")}
    assert len(layers) == 2 * 2 * len(TARGETS)  # blocks, self and cross attention


@pytest.mark.parametrize("encoder", ["frozen", "adapter"])
def test_one_update_trains_student_and_discriminator_and_nothing_else(tmp_path, encoder):
    config = stage_config(encoder)
    before = adapted(config)
    adapters, stage = trained(config, tmp_path)
    weights = before.backbone.module.state_dict()
    changed = {name for name, value in adapters.backbone.module.state_dict().items() if not torch.equal(value, weights[name])}
    names = ("student", "ema", *(["discriminator"] if encoder == "adapter" else []))
    assert {name.split(".")[-2] for name in changed} == set(names) and all(".lora_" in name for name in changed)
    assert stage.adversary is not None
    fresh = stage_of(config, before).adversary
    assert fresh is not None
    assert all(not torch.equal(a, b) for a, b in zip(stage.adversary.head.parameters(), fresh.head.parameters(), strict=True))
    moved, start = adapters.parameters("ema"), before.parameters("ema")
    for ema, student, old in zip(moved, adapters.parameters("student"), start, strict=True):
        assert torch.allclose(ema, (student + old) / 2)


def test_the_solvers_pass_gives_the_features_of_the_conditional_half():
    adapters = adapted(stage_config())
    stage = stage_of(stage_config(), adapters)
    ((rollout, _),) = stage.parts
    generator = torch.Generator().manual_seed(0)
    drawn = rollout.draw(generator)
    prediction = rollout.predict(drawn, generator)
    expected = adapters.features(None, drawn.x_tn, drawn.times.t_n, drawn.cond)
    assert prediction.features is not None and torch.allclose(prediction.features, expected, atol=1e-5)


@pytest.mark.parametrize("encoder", ["frozen", "adapter"])
def test_gradient_checkpointing_gives_the_same_gradients(encoder):
    found = []
    for checkpointing in (False, True):
        config = stage_config(encoder, checkpointing)
        adapters = adapted(config)
        loss, _ = stage_of(config, adapters)(torch.Generator().manual_seed(0))
        loss.backward()
        found.append([p.grad for name in adapters.names if name != "ema" for p in adapters.parameters(name)])
    for plain, again in zip(*found, strict=True):
        assert plain is not None and torch.allclose(plain, again, rtol=1e-4, atol=1e-7)


def test_a_stopped_training_goes_on_bit_for_bit(tmp_path):
    config = stage_config(steps=3, checkpoint_every=1)
    whole, _ = trained(config, tmp_path / "whole")
    short = config.model_copy(update={"loop": config.loop.model_copy(update={"steps": 1})})
    trained(short, tmp_path / "parts")
    parts, _ = trained(config, tmp_path / "parts")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters("student"), parts.parameters("student"), strict=True))


def test_the_lora_merges_into_a_fresh_network(tmp_path):
    adapters, _ = trained(stage_config(), tmp_path / "checkpoints")
    contract = Contract(2).to_json({**SCHEDULER, "prediction_type": "epsilon"})
    lora = adapters.export("ema", {"sampling_contract": contract})
    assert lora.component == "transformer"
    assert "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight" in lora.tensors
    assert all(key.startswith("transformer.") for key in lora.tensors)
    folder = tmp_path / "lora"
    LoRADataset(filepath=str(folder)).save(lora)
    with safe_open(folder / "pytorch_lora_weights.safetensors", "pt") as file:
        assert set(file.keys()) == set(lora.tensors)
    merged, (x, t, cond) = network(), batch()
    merge_lora(merged, LoRADataset(filepath=str(folder)).load())
    output = PixArtBackbone(merged)(x, t, cond)
    assert torch.allclose(output, adapters.denoiser("ema").network(x, t, cond), atol=1e-5)
    assert not torch.allclose(output, PixArtBackbone(network())(x, t, cond), atol=1e-4)
    with pytest.raises(UserError, match="does not fit this network"):
        merge_lora(merged, LoRA({key.replace("attn1", "attn3"): value for key, value in lora.tensors.items()}))


def test_a_dedicated_network_is_a_folder_of_its_own_class(tmp_path):
    contract = json.loads(Contract(1, only_timestep=800).to_json(SCHEDULER))
    backbone, other = PixArtBackbone(network()), PixArtBackbone(network(seed=1))
    write_network(tmp_path, backbone, contract, {"data_rows": "abc"})
    card = (tmp_path / "README.md").read_text()
    assert "transformer = PixArtTransformer2DModel.from_pretrained" in card and "transformer=transformer)" in card
    read_network(tmp_path, other)
    expected = copy.deepcopy(backbone.module).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in other.module.state_dict().items())


def test_its_cost_is_measured():
    config = stage_config()
    x, _, cond = batch()
    cost = measure_forward(adapted(config), x, cond, make_accelerator(config.loop).autocast, repeats=1)
    assert cost["unet_forward_seconds"] > 0 and cost["encoder_share"] > 0


def test_a_teachers_folder_may_hold_it(tmp_path, monkeypatch):
    monkeypatch.setattr(backbones, "FAMILIES", (*backbones.FAMILIES, PixArtBackbone))
    folder = tiny.write_sd15(tmp_path)
    shutil.rmtree(folder / "unet")
    network(text=32).save_pretrained(folder / "transformer")
    model = load_teacher(TeacherConfig(source=str(folder)), device="cpu")
    assert isinstance(model.backbone, PixArtBackbone) and model.latent_shape == (4, 8, 8) and model.resolution == 64
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([999, 24]), model.encode_prompts(tiny.CAPTIONS[:2])
    assert torch.equal(model.denoiser().network(x, t, cond), PixArtBackbone(network(text=32))(x, t, cond))
    before = model.content_hash("backbone")
    network(seed=1, text=32).save_pretrained(folder / "transformer")
    assert load_teacher(TeacherConfig(source=str(folder)), parts=()).content_hash("backbone") != before
