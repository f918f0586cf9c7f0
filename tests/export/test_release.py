"""Names, metadata and cards say what a user of another program has to know."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from pydantic import ValidationError

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.export.card import card, usage
from hypersd_pipeline.export.comfyui import simple_timesteps, workflow
from hypersd_pipeline.export.kohya import kohya_metadata
from hypersd_pipeline.export.release import ExportConfig, Release, check_export, release_of
from hypersd_pipeline.models.backbones import UNetBackbone
from hypersd_pipeline.models.contract import Contract

SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "prediction_type": "epsilon"}
K4, K1, UNIFIED, ONE = Contract(4), Contract(1), Contract(1, 0.3, "tcd", one_step_timestep=800), Contract(1, only_timestep=800)
METRICS = {"clip_score/4_steps": 31.5, "clip_score/4_steps_low": 31.0, "clip_score/4_steps_high": 32.0, "samples": 5000}
METRICS |= {"clip_score/8_steps": 30.0, "clip_score/8_steps_low": 29.0, "clip_score/8_steps_high": 31.0}
METRICS |= {"unseen_clip_score/4_steps": 1.0, "unseen_clip_score/4_steps_low": 0.0, "unseen_clip_score/4_steps_high": 2.0}


def teacher(layout: str = "sdxl", source: str = "owner/base", hub_id: str | None = "owner/base") -> Any:
    """What a release reads of a teacher."""
    side, process = {"sd15": 512, "sdxl": 1024}[layout], SimpleNamespace(num_train_timesteps=1000)
    told = {"layout": layout, "process": process, "resolution": side, "backbone": UNetBackbone}
    return SimpleNamespace(config=SimpleNamespace(source=source), hub_id=hub_id, **told)


def release(contract: Contract, lora: bool = True, config: dict[str, Any] | None = None, **given: Any) -> Release:
    told = {"teacher": "/home/me/models/x", "method": "TSCD", "data_rows": "abc"}
    return release_of(ExportConfig(license="openrail++", **(config or {})), teacher(**given), contract.to_json(SCHEDULE), told, lora)


@pytest.mark.parametrize(
    ("contract", "given", "name"),
    [
        (Contract(8), {"layout": "sd15"}, "Hyper-SD15-8steps-lora"),
        (K4, {}, "Hyper-SDXL-4steps-lora"),
        (UNIFIED, {}, "Hyper-SDXL-1step-lora"),
        (K1, {}, "Hyper-SDXL-1step-tscd-lora"),
        (ONE, {"lora": False}, "Hyper-SDXL-1step-Unet"),
        (K4, {"layout": "sd15", "source": "shipped", "hub_id": None}, "Hyper-Small-4steps-lora"),
        (K4, {"config": {"family": "Anime"}}, "Hyper-Anime-4steps-lora"),
    ],
)
def test_files_are_named_as_the_published_ones(contract, given, name):
    assert release(contract, **given).name == name


def test_the_place_of_a_local_teacher_is_named_nowhere():
    local = release(K4, source="/home/me/models/x", hub_id=None)
    tensors = {"lora_unet_x.lora_down.weight": torch.ones(2, 4), "lora_unet_x.alpha": torch.tensor(2.0)}
    text = card(local, METRICS, {"unet/": "x"}, "owner/name") + json.dumps(kohya_metadata(local, tensors, usage(local)))
    assert local.base_model is None and "/home" not in text and "path/to/the/base/model" in text


def test_metadata_of_a_kohya_file_says_rank_family_and_contract():
    tensors = {"lora_unet_x.lora_down.weight": torch.ones(16, 4, 3, 3), "lora_unet_x.alpha": torch.tensor(16.0)}
    found = kohya_metadata(release(UNIFIED, config={"author": "Me"}), tensors, usage(release(UNIFIED)))
    expected = {
        "ss_network_module": "networks.lora", "ss_network_dim": "16", "ss_network_alpha": "16", "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_args": '{"conv_dim": "16", "conv_alpha": "16"}', "modelspec.sai_model_spec": "1.0.0", "modelspec.author": "Me",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora", "modelspec.title": "Hyper-SDXL-1step-lora",
        "modelspec.resolution": "1024x1024", "modelspec.license": "openrail++", "modelspec.prediction_type": "epsilon",
        "modelspec.usage_hint": "TCDScheduler, 1 step at timestep 800, eta 0.3, no guidance (CFG 1), LoRA weight 1.",
    }  # fmt: skip
    assert expected.items() <= found.items() and all(isinstance(value, str) for value in found.values())
    assert Contract.read(found["sampling_contract"]) == UNIFIED
    assert json.loads(found["sampling_timesteps"])["4"] == [999, 759, 499, 259]
    assert found["modelspec.hash_sha256"] == f"0x{found['sshs_model_hash']}"


def test_the_hub_parses_the_card():
    """The header is what `ModelCard` reads: the class that the hub's own client has for it."""
    files = {"pytorch_lora_weights.safetensors": "x", "Hyper-SDXL-4steps-lora.safetensors": "y", "grid.png": "z"}
    parsed = ModelCard(card(release(K4), METRICS, files, "owner/Hyper-SDXL-4steps-lora"))
    data = parsed.data
    assert (data.base_model, data.license, data.pipeline_tag, data.library_name) == (
        "owner/base",
        "openrail++",
        "text-to-image",
        "diffusers",
    )
    assert data.base_model_relation == "adapter" and {"lora", "hyper-sd"} <= set(data.tags)
    (result,) = data.eval_results  # of the four steps that it is made for, on the test split
    assert (result.metric_type, result.metric_value, result.dataset_args) == ("clip_score", 31.5, {"steps": 4})
    for part in (
        "| 4 | 999, 749, 499, 249 |", "guidance_scale=0, eta=0.0)", "DDIMScheduler.from_pretrained", "`euler`", "sgm_uniform",
        "| clip_score | 4 | 31.5 | 31 to 32 |", "![Samples of the model, a row for each prompt](grid.png)",
    ):  # fmt: skip
        assert part in parsed.text, part
    assert "clip_score at 8" not in parsed.content


@pytest.mark.parametrize(
    ("contract", "steps", "sampler"),
    [
        (K4, 4, {"class_type": "KSampler", "sampler_name": "euler", "scheduler": "sgm_uniform", "steps": 4, "cfg": 1.0}),
        (UNIFIED, 4, {"class_type": "SamplerCustom", "sampler": ["tcd", 1], "sigmas": ["tcd", 2], "cfg": 1.0}),
        (UNIFIED, 1, {"class_type": "SamplerCustom", "sampler": ["euler", 0], "sigmas": ["sigmas", 0], "cfg": 1.0}),
    ],
)
def test_a_workflow_is_a_closed_graph_with_the_contract(contract, steps, sampler):
    nodes = workflow(release(contract), steps)
    assert sampler.items() <= {**nodes["sample"]["inputs"], "class_type": nodes["sample"]["class_type"]}.items()
    links = [value for node in nodes.values() for value in node["inputs"].values() if isinstance(value, list)]
    assert {name for name, _ in links} <= set(nodes)
    assert nodes["lora"]["inputs"]["strength_model"] == 1.0 and nodes["latents"]["inputs"]["width"] == 1024
    if "tcd" in nodes:
        assert nodes["tcd"]["inputs"]["eta"] == 0.3


def test_one_step_from_800_is_799_in_comfyui_and_other_timesteps_have_no_node():
    """``SDTurboScheduler`` has the timesteps 999, 899, ... and begins at ``10 - int(10 * denoise)`` of them."""
    denoise = workflow(release(ONE, lora=False), 1)["sigmas"]["inputs"]["denoise"]
    assert [999 - 100 * i for i in range(10)][10 - int(10 * denoise)] == 799
    odd = release(Contract(1, only_timestep=750), lora=False)
    assert workflow(odd, 1) is None and "no node of its own for a step from timestep 750" in card(odd, {}, {"unet/": "x"}, "a/b")


def test_simple_timesteps_are_near_those_of_tcd():
    assert simple_timesteps(4, 1000) == [999, 749, 499, 249]
    grid = release(UNIFIED).timesteps
    assert max(abs(a - b) for n in (2, 4, 8) for a, b in zip(simple_timesteps(n, 1000), grid[n], strict=True)) == 15


def test_an_upload_without_a_base_model_is_refused():
    config = ExportConfig(license="openrail++", push_to_hub="me", formats=["kohya"])
    with pytest.raises(UserError, match=r"^export\.push_to_hub: the card needs the teacher's hub id, so set export\.base_model\.$"):
        check_export(config, None)
    check_export(config, "owner/base")
    check_export(config.model_copy(update={"base_model": "owner/base"}), None)


@pytest.mark.parametrize("wrong", [{"formats": []}, {"formats": ["ckpt"]}, {"base_model": "/models/x"}, {"push_to_hub": "me/name"}, {}])
def test_values_that_cannot_be_meant_are_refused(wrong):
    with pytest.raises(ValidationError):
        ExportConfig(**({"license": "mit", **wrong} if wrong else {}))


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(monkeypatch, package):
    monkeypatch.setattr("hypersd_pipeline.export.release.find_spec", lambda name: None if name == package else object())
    with pytest.raises(UserError, match=rf"onnx needs the package {package}; install it with pip install 'hypersd-pipeline\[onnx\]'"):
        check_export(ExportConfig(license="mit"), None)
    check_export(ExportConfig(license="mit", formats=["kohya"]), None)


def test_a_contract_of_another_schedule_is_refused():
    with pytest.raises(UserError, match="the timestep 1200, but the teacher's end at 999"):
        release(Contract(1, only_timestep=1200), lora=False)
