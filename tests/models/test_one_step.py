"""The sampling contract as JSON and as a grid, and the one-step UNet's folder in diffusers."""

import json

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, LCMScheduler, TCDScheduler, UNet2DConditionModel

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.contract import Contract
from hypersd_pipeline.models.lora import LoRA
from hypersd_pipeline.models.one_step import CONTRACT, read_contract, read_network, write_network
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher

SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "trained_betas": None}


def read(contract, prediction_type="epsilon"):
    return json.loads(contract.to_json({**SCHEDULE, "prediction_type": prediction_type}))


@pytest.mark.parametrize(
    ("contract", "scheduler", "sampling"),
    [
        (Contract(4), "DDIMScheduler", {"timestep_spacing": "trailing", "eta": 0.0}),
        (Contract(4, 0.3), "TCDScheduler", {"timestep_spacing": "trailing", "eta": 0.3}),
        (Contract(1, grid="tcd"), "TCDScheduler", {"timestep_spacing": "tcd", "eta": 0.0}),
        (Contract(1, only_timestep=800), "LCMScheduler", {"timesteps": [800]}),
    ],
)
def test_the_contract_names_scheduler_and_grid(contract, scheduler, sampling):
    found = read(contract, "v_prediction")
    config = found.pop("scheduler_config")
    assert found == {"scheduler": scheduler, "steps": contract.steps, "guidance_scale": 1.0, **sampling}
    assert config == {
        **SCHEDULE,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "set_alpha_to_one": False,
        "clip_sample": False,
        "steps_offset": 1,
    }


@pytest.mark.parametrize(
    ("contract", "scheduler"),
    [(Contract(4), DDIMScheduler), (Contract(4, grid="tcd"), TCDScheduler), (Contract(1, only_timestep=800), LCMScheduler)],
)
def test_diffusers_builds_the_named_scheduler_with_this_grid(contract, scheduler):
    found = read(contract)
    made = scheduler.from_config({"_class_name": found["scheduler"], **found["scheduler_config"]})
    if contract.only_timestep is None:
        made.set_timesteps(contract.steps)
    else:
        made.set_timesteps(timesteps=found["timesteps"])
    assert made.timesteps.tolist() == contract.timesteps(contract.steps, 1000).tolist()


def test_timesteps_of_each_grid():
    assert Contract(4).timesteps(4, 1000).tolist() == [999, 749, 499, 249]
    assert Contract(1, grid="tcd").timesteps(4, 1000).tolist() == [999, 759, 499, 259]
    only = Contract(1, only_timestep=800).timesteps(1, 1000)
    assert only.tolist() == [800] and only.dtype == torch.int64


def lora(**metadata):
    return LoRA({}, metadata)


@pytest.mark.parametrize("contract", [Contract(8), Contract(2, 0.3), Contract(1, grid="tcd"), Contract(1, 1.0, "tcd")])
def test_a_loras_contract_comes_back(contract):
    assert Contract.of(lora(sampling_contract=contract.to_json(SCHEDULE))) == contract


@pytest.mark.parametrize("metadata", [{}, {"sampling_contract": "{"}, {"sampling_contract": "{}"}, {"sampling_contract": "[1]"}])
def test_a_contract_that_cannot_be_read_is_refused(metadata):
    with pytest.raises(UserError, match="no readable sampling_contract"):
        Contract.of(lora(**metadata))


def test_a_contract_with_guidance_is_refused():
    guided = json.dumps({**read(Contract(4)), "guidance_scale": 7.5})
    with pytest.raises(UserError, match=r"asks for guidance_scale 7\.5"):
        Contract.of(lora(sampling_contract=guided))


def test_the_unets_folder_holds_all_that_diffusers_needs(tmp_path):
    backbone = load_teacher(TeacherConfig(source=str(tiny.write_sd15(tmp_path))), parts=("backbone",)).backbone
    folder = tmp_path / "one_step"
    write_network(folder, backbone, read(Contract(1, only_timestep=800)), {"teacher": "shipped", "data_rows": "abc"})
    again = UNet2DConditionModel.from_pretrained(folder, use_safetensors=True).state_dict()
    written = backbone.module.state_dict()
    assert again.keys() == written.keys() and all(torch.equal(again[name], value) for name, value in written.items())
    scheduler = LCMScheduler.from_pretrained(folder)
    assert scheduler.config.beta_schedule == "scaled_linear" and scheduler.config.prediction_type == "epsilon"
    contract = json.loads((folder / CONTRACT).read_text())
    assert (contract["scheduler"], contract["timesteps"], contract["data_rows"]) == ("LCMScheduler", [800], "abc")
    card = (folder / "README.md").read_text()
    assert "unet = UNet2DConditionModel.from_pretrained" in card and "unet=unet)" in card
    assert "timesteps=[800]" in card and 'from_pretrained("src/hypersd_pipeline/assets/teacher"' in card


def test_a_network_takes_the_folders_weights_and_gives_its_contract(tmp_path):
    written, other = (
        load_teacher(TeacherConfig(source=str(tiny.write_sd15(tmp_path / str(seed), seed=seed))), parts=("backbone",)).backbone
        for seed in (0, 1)
    )
    write_network(tmp_path / "one_step", written, read(Contract(1, only_timestep=800)), {"data_rows": "abc"})
    contract = read_network(tmp_path / "one_step", other)
    expected = written.module.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in other.module.state_dict().items())
    assert contract == read_contract(tmp_path / "one_step") and (contract["timesteps"], contract["data_rows"]) == ([800], "abc")


def test_one_flipped_bit_or_missing_weights_are_refused_by_name(tmp_path):
    network = load_teacher(TeacherConfig(source=str(tiny.write_sd15(tmp_path / "teacher"))), parts=("backbone",)).backbone
    folder = tmp_path / "one_step"
    write_network(folder, network, read(Contract(1, only_timestep=800)), {"data_rows": "abc"})
    weights = folder / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"one_step is damaged: its weights do not match their recorded hashes; restore it"):
        read_network(folder, network)
    weights.unlink()
    with pytest.raises(UserError, match=r"one_step is damaged"):
        read_network(folder, network)


@pytest.mark.parametrize("text", [None, "{"])
def test_a_folder_without_a_readable_contract_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / CONTRACT).write_text(text)
    with pytest.raises(UserError, match=r"sampling_contract\.json cannot be read .*train the one-step network again"):
        read_contract(tmp_path)


def test_another_first_timestep_is_for_one_step_only():
    contract = Contract(1, 0.3, "tcd", one_step_timestep=800)
    assert contract.timesteps(1, 1000).tolist() == [800]
    assert contract.timesteps(2, 1000).tolist() == Contract(1, 0.3, "tcd").timesteps(2, 1000).tolist() == [999, 499]
    assert Contract.of(LoRA({}, {"sampling_contract": contract.to_json({})})) == contract
