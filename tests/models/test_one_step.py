"""The sampling contract as JSON and as a grid, and the one-step UNet's folder in diffusers."""

import json

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, LCMScheduler, TCDScheduler, UNet2DConditionModel

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.lora import Contract, LoRA
from hypersd_pipeline.models.one_step import CONTRACT, write_unet
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher

SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "trained_betas": None}


def read(contract, prediction_type="epsilon"):
    return json.loads(contract.to_json(SCHEDULE, prediction_type))


@pytest.mark.parametrize(
    ("contract", "scheduler", "sampling"),
    [
        (Contract(4), "DDIMScheduler", {"timestep_spacing": "trailing", "eta": 0.0}),
        (Contract(4, 0.3), "TCDScheduler", {"timestep_spacing": "trailing", "eta": 0.3}),
        (Contract(1, grid="tcd"), "TCDScheduler", {"timestep_spacing": "tcd", "eta": 0.0}),
        (Contract(1, only=800), "LCMScheduler", {"timesteps": [800]}),
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
    [(Contract(4), DDIMScheduler), (Contract(4, grid="tcd"), TCDScheduler), (Contract(1, only=800), LCMScheduler)],
)
def test_diffusers_builds_the_named_scheduler_with_this_grid(contract, scheduler):
    found = read(contract)
    made = scheduler.from_config({"_class_name": found["scheduler"], **found["scheduler_config"]})
    if contract.only is None:
        made.set_timesteps(contract.steps)
    else:
        made.set_timesteps(timesteps=found["timesteps"])
    assert made.timesteps.tolist() == contract.timesteps(contract.steps, 1000).tolist()


def test_timesteps_of_each_grid():
    assert Contract(4).timesteps(4, 1000).tolist() == [999, 749, 499, 249]
    assert Contract(1, grid="tcd").timesteps(4, 1000).tolist() == [999, 759, 499, 259]
    only = Contract(1, only=800).timesteps(1, 1000)
    assert only.tolist() == [800] and only.dtype == torch.int64


def lora(**metadata):
    return LoRA({}, metadata)


@pytest.mark.parametrize("contract", [Contract(8), Contract(2, 0.3), Contract(1, grid="tcd"), Contract(1, 1.0, "tcd")])
def test_a_loras_contract_comes_back(contract):
    assert Contract.of(lora(sampling_contract=contract.to_json(SCHEDULE, "epsilon"))) == contract


@pytest.mark.parametrize("metadata", [{}, {"sampling_contract": "{"}, {"sampling_contract": "{}"}, {"sampling_contract": "[1]"}])
def test_a_contract_that_cannot_be_read_is_refused(metadata):
    with pytest.raises(UserError, match="no readable sampling_contract"):
        Contract.of(lora(**metadata))


def test_a_contract_with_guidance_is_refused():
    guided = json.dumps({**read(Contract(4)), "guidance_scale": 7.5})
    with pytest.raises(UserError, match=r"asks for guidance_scale 7\.5"):
        Contract.of(lora(sampling_contract=guided))


def test_the_unets_folder_holds_all_that_diffusers_needs(tmp_path):
    unet = load_teacher(TeacherConfig(source=str(tiny.write_sd15(tmp_path))), parts=("unet",)).unet
    folder = tmp_path / "one_step"
    write_unet(folder, unet, read(Contract(1, only=800)), {"teacher": "shipped", "data_rows": "abc"})
    again = UNet2DConditionModel.from_pretrained(folder, use_safetensors=True).state_dict()
    assert again.keys() == unet.state_dict().keys() and all(torch.equal(again[name], value) for name, value in unet.state_dict().items())
    scheduler = LCMScheduler.from_pretrained(folder)
    assert scheduler.config.beta_schedule == "scaled_linear" and scheduler.config.prediction_type == "epsilon"
    contract = json.loads((folder / CONTRACT).read_text())
    assert (contract["scheduler"], contract["timesteps"], contract["data_rows"]) == ("LCMScheduler", [800], "abc")
    card = (folder / "README.md").read_text()
    assert "timesteps=[800]" in card and 'from_pretrained("src/hypersd_pipeline/assets/teacher"' in card


def test_another_first_timestep_is_for_one_step_only():
    contract = Contract(1, 0.3, "tcd", first=800)
    assert contract.timesteps(1, 1000).tolist() == [800]
    assert contract.timesteps(2, 1000).tolist() == Contract(1, 0.3, "tcd").timesteps(2, 1000).tolist() == [999, 499]
    assert Contract.of(LoRA({}, {"sampling_contract": contract.to_json({}, "epsilon")})) == contract
