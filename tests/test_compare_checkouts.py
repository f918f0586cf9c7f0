"""The comparison of two checkouts' models, by content."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FILE = "lora_k1/pytorch_lora_weights.safetensors"


@pytest.fixture
def compare(monkeypatch, capsys):
    """``compare(*options)``: the exit code and what was printed."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import compare_checkouts

    def call(*options):
        monkeypatch.setattr(sys, "argv", ["compare_checkouts.py", *map(str, options)])
        return compare_checkouts.main(), capsys.readouterr().out

    return call


def tensors():
    return {"unet.a.lora_A.weight": torch.arange(6.0).view(2, 3), "unet.a.lora_B.weight": torch.ones(4, 2)}


def write(checkout, content, name=FILE, env="smoke", **metadata):
    file = checkout / "data" / env / "06_models" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(content, file, metadata)
    return checkout


def one_value(content):
    content["unet.a.lora_A.weight"][1, 2] += 1e-6


def name(content):
    content["unet.b.lora_A.weight"] = content.pop("unet.a.lora_A.weight")


def dtype(content):
    content["unet.a.lora_B.weight"] = content["unet.a.lora_B.weight"].bfloat16()


def shape(content):
    content["unet.a.lora_A.weight"] = content["unet.a.lora_A.weight"].reshape(3, 2)


def missing_tensor(content):
    del content["unet.a.lora_B.weight"]


def test_the_same_content_with_other_metadata_is_the_same(tmp_path, compare):
    before, after = write(tmp_path / "before", tensors(), teacher="x"), write(tmp_path / "after", tensors(), source="y", date="today")
    code, printed = compare(before, after, "--env", "smoke")
    state, one, other, file = printed.split()
    assert (code, state, file) == (0, "same", FILE) and one == other and len(one) == 16


@pytest.mark.parametrize("change", [one_value, name, dtype, shape, missing_tensor])
def test_any_change_of_the_content_differs(tmp_path, compare, change):
    content = tensors()
    change(content)
    before, after = write(tmp_path / "before", tensors()), write(tmp_path / "after", content)
    for checkout in (before, after):
        write(checkout, tensors(), "one_step_unet/diffusion_pytorch_model.safetensors")
    code, printed = compare(before, after, "--env", "smoke")
    states = {line.split()[-1]: line.split()[0] for line in printed.splitlines()}
    assert code == 1 and states == {FILE: "DIFFERS", "one_step_unet/diffusion_pytorch_model.safetensors": "same"}


@pytest.mark.parametrize("missing_in", ["before", "after"])
def test_a_missing_model_differs(tmp_path, compare, missing_in):
    for checkout in ("before", "after"):
        write(tmp_path / checkout, tensors())
    write(tmp_path / ("after" if missing_in == "before" else "before"), tensors(), "lora_k2/pytorch_lora_weights.safetensors")
    code, printed = compare(tmp_path / "before", tmp_path / "after", "--env", "smoke")
    (line,) = (line for line in printed.splitlines() if "lora_k2" in line)
    assert code == 1 and line.split()[0] == "DIFFERS" and "missing" in line.split()[1 if missing_in == "before" else 2]


def test_checkpoints_and_pairs_are_no_models(tmp_path, compare):
    for number, checkout in enumerate(("before", "after")):
        write(tmp_path / checkout, tensors())
        for folder in ("checkpoints/k1", "pairs/unified"):
            write(tmp_path / checkout, {"x": torch.full((2,), float(number))}, f"{folder}/step.safetensors")
    code, printed = compare(tmp_path / "before", tmp_path / "after", "--env", "smoke")
    assert code == 0 and len(printed.splitlines()) == 1


def test_a_checkout_without_folders_of_environments_is_read_too(tmp_path, compare):
    before, after = write(tmp_path / "before", tensors(), env=""), write(tmp_path / "after", tensors())
    assert compare(before, after, "--env", "smoke")[0] == 0


def test_nothing_there_is_said_in_a_sentence(tmp_path, compare):
    with pytest.raises(SystemExit) as stopped:
        compare(tmp_path, tmp_path)
    assert str(stopped.value.code) == "Error: neither checkout has a model below data/06_models; add --run, or run the main job first."
