"""Datasets write what they say and read it back."""

import json
import math

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import save_file

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.io import CheckpointsDataset, ImageDataset, LoRADataset, MetricsDataset, MetricStreamDataset
from hypersd_pipeline.io.lora import model_card
from hypersd_pipeline.models.lora import LoRA

CONTRACT = {
    "scheduler": "DDIMScheduler",
    "scheduler_config": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "trailing"},
    "steps": 4,
    "timestep_spacing": "trailing",
    "eta": 0.0,
    "guidance_scale": 1.0,
}


@pytest.fixture
def lora() -> LoRA:
    tensors = {"unet.a.lora_A.weight": torch.randn(2, 4), "unet.a.lora_B.weight": torch.randn(4, 2).T.contiguous().T}
    return LoRA(tensors=tensors, metadata={"sampling_contract": json.dumps(CONTRACT), "segments": "4"})


def test_a_lora_folder_reads_back_equal_and_holds_its_contract(tmp_path, lora):
    dataset = LoRADataset(filepath=str(tmp_path / "models" / "lora_k4"))
    assert not dataset.exists()
    dataset.save(lora)
    dataset.save(lora)  # a second time replaces the folder
    loaded = dataset.load()
    assert dataset.exists() and loaded.tensors.keys() == lora.tensors.keys()
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in lora.tensors.items())
    assert lora.metadata.items() <= loaded.metadata.items()
    folder = tmp_path / "models" / "lora_k4"
    assert {path.name for path in folder.iterdir()} == {"pytorch_lora_weights.safetensors", "scheduler_config.json", "README.md"}
    assert [path.name for path in folder.parent.iterdir()] == ["lora_k4"]  # nothing temporary is left
    scheduler = DDIMScheduler.from_pretrained(folder)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    assert "num_inference_steps=4, guidance_scale=0" in (folder / "README.md").read_text()


def test_a_lora_that_fails_to_write_leaves_the_old_folder(tmp_path, lora):
    dataset = LoRADataset(filepath=str(tmp_path / "lora"))
    dataset.save(lora)
    broken = LoRA(tensors={"x": torch.empty(2, device="meta")}, metadata=lora.metadata)
    with pytest.raises(Exception, match="meta"):
        dataset.save(broken)
    assert dataset.load().tensors.keys() == lora.tensors.keys() and [path.name for path in tmp_path.iterdir()] == ["lora"]


def test_missing_and_damaged_loras_are_the_users_to_mend(tmp_path, lora):
    dataset = LoRADataset(filepath=str(tmp_path / "lora"))
    with pytest.raises(Exception, match="is missing") as caught:
        dataset.load()
    assert isinstance(caught.value.__cause__, UserError)
    dataset.save(lora)
    (tmp_path / "lora" / "pytorch_lora_weights.safetensors").write_bytes(b"not tensors")
    with pytest.raises(Exception, match="is damaged"):
        dataset.load()


def test_one_flipped_bit_in_a_lora_is_refused_by_name_and_one_without_a_hash_is_read(tmp_path, lora):
    dataset = LoRADataset(filepath=str(tmp_path / "lora"))
    dataset.save(lora)
    path = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(Exception, match=r"lora/pytorch_lora_weights.safetensors is damaged .its weights do not match"):
        dataset.load()
    save_file({name: tensor.contiguous() for name, tensor in lora.tensors.items()}, path, lora.metadata)  # of another program
    assert dataset.load().metadata == lora.metadata


def test_metrics_are_strict_json(tmp_path):
    dataset = MetricsDataset(filepath=str(tmp_path / "metrics.json"))
    dataset.save({"fid": {4: torch.tensor(1.5)}, "clip": math.nan, "values": [1, math.inf], "name": "x"})
    expected = {"fid": {"4": 1.5}, "clip": None, "values": [1, None], "name": "x"}
    assert dataset.load() == expected == json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)


def test_a_stream_writes_a_curve_and_a_resumed_one_goes_on_after_its_checkpoint(tmp_path):
    path = tmp_path / "curves" / "stage.csv"
    dataset = MetricStreamDataset(filepath=str(path))
    first = dataset.load()
    for step in range(4):
        first({"loss": float(step)}, step)
    assert path.read_text().splitlines() == ["step,loss", *(f"{step},{step}.0" for step in range(4))]  # at once
    resumed = dataset.load()
    resumed({"loss": 20.0}, 2)
    resumed({"loss": 30.0, "skipped": 1.0}, 3)
    assert path.read_text().splitlines() == ["step,loss,skipped", "0,0.0,", "1,1.0,", "2,20.0,", "3,30.0,1.0"]


def test_checkpoints_survive_between_handles(tmp_path):
    CheckpointsDataset(filepath=str(tmp_path / "store")).load().save(3, "key", {"x": torch.ones(2)})
    step, state = CheckpointsDataset(filepath=str(tmp_path / "store")).load().load("key")
    assert step == 3 and torch.equal(state["x"], torch.ones(2))


def test_images_are_lossless(tmp_path):
    image = Image.effect_noise((8, 8), 50).convert("RGB")
    dataset = ImageDataset(filepath=str(tmp_path / "grids" / "grid.png"))
    dataset.save(image)
    assert dataset.load().tobytes() == image.tobytes()


@pytest.mark.parametrize("dataset", [CheckpointsDataset, MetricStreamDataset])
def test_handles_refuse_to_be_outputs(tmp_path, dataset):
    with pytest.raises(Exception, match="input of a node"):
        dataset(filepath=str(tmp_path / "x")).save(object())


def test_the_card_names_the_timestep_of_one_step_only_where_one_step_is_taken():
    contract = {**CONTRACT, "one_step_timesteps": [800]}
    four, one = (model_card("x", {"sampling_contract": json.dumps({**contract, "steps": steps})}) for steps in (4, 1))
    assert "num_inference_steps=4, guidance_scale=0, eta=0.0)" in four
    assert "num_inference_steps=1, guidance_scale=0, eta=0.0, timesteps=[800])" in one
