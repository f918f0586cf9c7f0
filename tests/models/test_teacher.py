"""Teachers of both layouts, compared with diffusers' own pipelines on tiny random checkpoints."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from diffusers import DDIMScheduler

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.teacher import TeacherConfig, check_shipped, load_teacher

LAYOUTS = ("sd15", "sdxl")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("teachers")
    return {layout: tiny.write_teacher(root / layout, layout) for layout in LAYOUTS}


def teacher_at(folder: Path, *parts: str, **config):
    return load_teacher(TeacherConfig(source=str(folder), **config), parts or ("backbone", "vae", "text"), "cpu")


def random_conditioning(teacher, n: int) -> Conditioning:
    return teacher.encode_prompts(tiny.CAPTIONS[:n])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prompts_are_encoded_as_the_pipeline_does(folders, layout):
    pipe = tiny.load_pipeline(folders[layout])
    long = "cat " * 200
    prompts = [*tiny.CAPTIONS, long, ""]
    expected = pipe.encode_prompt(prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    teacher = teacher_at(folders[layout], "text")
    cond, uncond = teacher.encode_prompts(prompts), teacher.unconditional(len(prompts))
    ours = (cond.prompt_embeds, uncond.prompt_embeds, cond.pooled, uncond.pooled)
    assert len(expected) == (2 if layout == "sd15" else 4)
    for mine, theirs in zip(ours, expected, strict=False):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert len(teacher.encode_prompts(prompts * 30)) == 150  # more than one text batch


def test_unconditional_is_zeros_for_sdxl_only_where_the_model_says_so(folders, tmp_path):
    zeros = teacher_at(folders["sdxl"], "text").unconditional(2)
    assert not zeros.prompt_embeds.any() and not zeros.pooled.any() and zeros.sizes.shape == (2, 6)
    encoded = teacher_at(tiny.write_sdxl(tmp_path, zero_unconditional=False), "text")
    torch.testing.assert_close(encoded.unconditional(1).pooled, encoded.encode_prompts([""]).pooled)
    assert encoded.unconditional(1).pooled.any()


def test_sdxl_sizes_are_size_crop_target(folders):
    assert teacher_at(folders["sdxl"], "text").encode_prompts(["x"]).sizes.tolist() == [[64, 64, 0, 0, 64, 64]]
    assert teacher_at(folders["sdxl"], "text", resolution=128).encode_prompts(["x"]).sizes.tolist() == [[128, 128, 0, 0, 128, 128]]
    assert teacher_at(folders["sd15"], "text").encode_prompts(["x"]).sizes is None


def test_long_prompts_are_counted_once(folders, caplog):
    with caplog.at_level(logging.WARNING):
        teacher_at(folders["sd15"], "text").encode_prompts(["cat " * 200, "a cat", "tree " * 90])
    assert [r.getMessage() for r in caplog.records if "cut" in r.getMessage()] == ["2 of 3 prompts are longer than 77 tokens and were cut"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_vae_scales_and_stays_in_range(folders, layout):
    teacher = teacher_at(folders[layout], "vae")
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    mean, std = teacher.encode_images(images)
    posterior = teacher.vae.encode(images).latent_dist
    factor = {"sd15": 0.18215, "sdxl": 0.13025}[layout]
    torch.testing.assert_close(mean, posterior.mean * factor)
    torch.testing.assert_close(std, posterior.std * factor)
    assert mean.shape == (2, *teacher.latent_shape)
    latents = (mean * 50).requires_grad_()
    decoded = teacher.decode(latents)
    expected = (teacher.vae.decode(latents.detach() / factor).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(decoded, expected)
    decoded.sum().backward()
    assert latents.grad.abs().sum() > 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_denoiser_is_the_frozen_unet(folders, layout):
    teacher = teacher_at(folders[layout], "backbone", "text")
    unet = teacher.backbone.module
    assert not unet.training and not any(p.requires_grad for p in unet.parameters())
    cond = random_conditioning(teacher, 2)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([999, 24])
    added = {"text_embeds": cond.pooled, "time_ids": cond.sizes} if layout == "sdxl" else None
    expected = unet(x, t, encoder_hidden_states=cond.prompt_embeds, added_cond_kwargs=added).sample
    torch.testing.assert_close(teacher.denoiser().network(x, t, cond), expected)
    assert teacher.denoiser().process is teacher.process
    half = teacher_at(folders[layout], "backbone", dtype="bfloat16")
    output = half.denoiser().network(x, t, cond)
    assert output.dtype == torch.float32 and (output.float() - expected).abs().mean() < 0.1 * expected.abs().mean()


def test_only_the_asked_parts_are_loaded(folders):
    teacher = teacher_at(folders["sd15"], "vae", dtype="bfloat16")
    assert teacher.vae.dtype == torch.float32
    for use in (lambda: teacher.backbone, lambda: teacher.encode_prompts(["x"])):
        with pytest.raises(ValueError, match="loaded without"):
            use()
    assert (teacher.layout, teacher.latent_shape, teacher.resolution) == ("sd15", (4, 8, 8), 64)


def test_a_part_that_is_not_asked_for_may_be_missing(folders, tmp_path):
    folder = shutil.copytree(folders["sd15"], tmp_path / "no_unet_weights")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    teacher_at(folder, "vae", "text")
    with pytest.raises(UserError, match="unet has no safetensors weights"):
        teacher_at(folder, "backbone")


def test_prediction_type_is_read_from_the_scheduler_and_can_be_set(tmp_path):
    folder = tiny.write_sd15(tmp_path, "v_prediction")
    assert teacher_at(folder, "vae").process.prediction_type == "v_prediction"
    assert teacher_at(folder, "vae", prediction_type="epsilon").process.prediction_type == "epsilon"


def test_scheduler_config_makes_the_same_schedule(folders):
    teacher = teacher_at(folders["sdxl"], "vae")
    made = DDIMScheduler(**teacher.scheduler_config())
    torch.testing.assert_close(made.alphas_cumprod, (teacher.process.alphas**2).float(), rtol=1e-4, atol=1e-7)


def test_layout_is_checked(folders):
    assert teacher_at(folders["sdxl"], "vae").config.layout == "sdxl"
    with pytest.raises(UserError, match=r"teacher\.layout: 'sdxl'"):
        teacher_at(folders["sd15"], "vae", layout="sdxl")


def test_variant_selects_the_weight_files(folders, tmp_path):
    folder = shutil.copytree(folders["sd15"], tmp_path / "variant")
    pipe = tiny.load_pipeline(folders["sd15"])
    pipe.to(torch.float16).save_pretrained(folder, variant="fp16")
    plain, half = teacher_at(folder), teacher_at(folder, variant="fp16")
    weights = [teacher.backbone.module.state_dict()["conv_in.weight"] for teacher in (plain, half)]
    assert not torch.equal(*weights)
    torch.testing.assert_close(weights[0].half().float(), weights[1])
    assert plain.content_hash("backbone") != half.content_hash("backbone")
    assert plain.content_hash("backbone") == teacher_at(folders["sd15"]).content_hash("backbone")
    with pytest.raises(UserError, match=r"teacher\.variant"):
        teacher_at(folder, "backbone", variant="bf16")


def test_content_hash_follows_weights_and_config(folders, tmp_path):
    folder = shutil.copytree(folders["sd15"], tmp_path / "changed")
    before = {part: teacher_at(folder, part).content_hash(part) for part in ("backbone", "vae", "text")}
    assert len(set(before.values())) == 3
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    after = {part: teacher_at(folder, part).content_hash(part) for part in ("backbone", "vae", "text")}
    assert [part for part in before if before[part] != after[part]] == ["vae"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such/folder", "there is no folder"),
        ("file.safetensors", "single file"),
        ("empty", "no model_index.json"),
    ],
)
def test_a_wrong_source_is_named(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.safetensors").touch()
    with pytest.raises(UserError, match=message):
        teacher_at(tmp_path / name)


def test_an_unreachable_hub_id_is_a_user_error(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"could not be fetched from the hub.*local diffusers folder"):
        load_teacher(TeacherConfig(source="nobody/no-such-model"))


def test_bin_only_weights_are_refused(folders, tmp_path):
    folder = shutil.copytree(folders["sd15"], tmp_path / "bin")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"only \.bin weights"):
        teacher_at(folder, "backbone")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("unet/config.json", {"in_channels": 9}, "inpainting"),
        ("vae/config.json", {"shift_factor": 0.1}, "shift_factor"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type 'flow'"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "zero-terminal"),
    ],
)
def test_unsupported_teachers_are_refused(folders, tmp_path, file, change, message):
    folder = shutil.copytree(folders["sd15"], tmp_path / "odd")
    (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **change}))
    with pytest.raises(UserError, match=message):
        teacher_at(folder, "vae")


def test_resolution_must_fit_the_vae(folders):
    with pytest.raises(UserError, match=r"teacher.resolution: 100 .* use 96"):
        teacher_at(folders["sd15"], "vae", resolution=100)


def test_shipped_files_are_checked_against_their_hashes(tmp_path):
    (tmp_path / "unet").mkdir()
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(b"weights")
    with pytest.raises(UserError, match=r"sha256\.json is missing"):
        check_shipped(tmp_path)
    table = {"unet/diffusion_pytorch_model.safetensors": hashlib.sha256(b"weights").hexdigest()}
    (tmp_path / "sha256.json").write_text(json.dumps(table))
    check_shipped(tmp_path)
    weights.write_bytes(b"weightz")
    with pytest.raises(UserError, match=r"differ from sha256\.json"):
        check_shipped(tmp_path)


def test_base_configuration_is_a_valid_teacher():
    path = Path(__file__).parents[2] / "conf" / "base" / "parameters_model.yml"
    assert TeacherConfig(**yaml.safe_load(path.read_text())["teacher"]).source == "shipped"
