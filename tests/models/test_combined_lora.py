"""The weighted sum of two LoRAs, in diffusers."""

import pytest
import tiny
import torch
from safetensors.torch import save_file

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.adapters import AdaptedBackbone
from hypersd_pipeline.models.lora import LoRA, combine, merge_lora
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher


def lora(rank, targets, seed, folder):
    model = load_teacher(TeacherConfig(source=str(folder)), parts=("backbone",))
    adapters = AdaptedBackbone(model.backbone, model.process, rank=rank, target_modules=targets, names=("x",), trainable=())
    for parameter in adapters.parameters("x"):
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return adapters.export("x", {"sampling_contract": "{}"})


def test_combined_lora_is_the_sum_of_both_in_diffusers(tmp_path):
    """Other ranks and other modules: one file, loaded by diffusers, gives the image of both merged with their weights."""
    folder = tiny.write_sd15(tmp_path)
    distilled, more = lora(4, ("to_q", "conv1"), 1, folder), lora(2, ("to_q", "to_v"), 2, folder)
    both = combine(distilled, more, 0.7)
    assert both.rank == 6 and isinstance(both, LoRA) and both.metadata == distilled.metadata
    save_file({k: v.contiguous() for k, v in both.tensors.items()}, tmp_path / "pytorch_lora_weights.safetensors")
    pipeline = tiny.load_pipeline(folder)
    pipeline.load_lora_weights(str(tmp_path), weight_name="pytorch_lora_weights.safetensors")
    unet = load_teacher(TeacherConfig(source=str(folder)), parts=("backbone",)).backbone.module
    merge_lora(unet, distilled)
    merge_lora(unet, more, 0.7)
    x, t, text = torch.randn(1, 4, 8, 8), torch.tensor([400]), torch.randn(1, 5, 32)
    with torch.no_grad():
        torch.testing.assert_close(pipeline.unet(x, t, text).sample, unet(x, t, text).sample, rtol=1e-4, atol=1e-5)


def test_a_combined_lora_of_a_chosen_rank_is_the_closest(tmp_path):
    """At the full rank nothing is lost. Below it the error is that of the singular values that are left out. Each rank can learn."""
    folder = tiny.write_sd15(tmp_path)
    distilled, more = lora(4, ("to_q", "conv1"), 1, folder), lora(2, ("to_q", "to_v"), 2, folder)
    stacked, whole, few = (combine(distilled, more, 0.7, rank=rank).modules() for rank in (None, 6, 3))
    for name, (a, b) in stacked.items():
        product = b.flatten(1) @ a.flatten(1)
        for found, rank in ((whole, 6), (few, 3)):
            low_a, low_b = found[name]
            assert low_a.shape == (rank, *a.shape[1:]) and low_b.shape == (len(b), rank, *b.shape[2:])
            error = (low_b.flatten(1) @ low_a.flatten(1) - product).norm()
            left = torch.linalg.svdvals(product)[rank:].norm()
            torch.testing.assert_close(error, left, rtol=1e-3, atol=1e-5)
            assert (low_a.flatten(1).norm(dim=1) > 1e-4).all(), name  # with A and B both zero a rank would never learn
    assert any((a.flatten(1).norm(dim=1) == 0).any() for a, _ in stacked.values())  # as they are where ranks are stacked
    with pytest.raises(UserError, match="start_rank is 7, more than the 4 \\+ 2"):
        combine(distilled, more, 1.0, rank=7)
