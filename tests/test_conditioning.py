"""What a network is conditioned on, as batches."""

import pytest
import torch

from hypersd_pipeline.conditioning import Conditioning, size_conditioning


def conditioning(n: int, sdxl: bool = False, seed: int = 0) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(n, 3, 4, generator=generator)
    return Conditioning(embeds, torch.randn(n, 5, generator=generator), torch.arange(6.0 * n).view(n, 6)) if sdxl else Conditioning(embeds)


@pytest.mark.parametrize("sdxl", [False, True])
def test_conditioning_operations_act_on_every_part(sdxl):
    cond = conditioning(3, sdxl)
    picked = cond[torch.tensor([2, 0])]
    both = Conditioning.cat(cond, picked)
    wide = cond[1:2].expand(4)
    half = cond.to(torch.float16)
    assert (len(cond), len(picked), len(both), len(wide), len(half)) == (3, 2, 5, 4, 3)
    for name in ("prompt_embeds", "pooled", "sizes"):
        part = getattr(cond, name)
        if part is None:
            assert not sdxl and all(getattr(c, name) is None for c in (picked, both, wide, half))
            continue
        assert torch.equal(getattr(picked, name), part[[2, 0]])
        assert torch.equal(getattr(both, name), part[[0, 1, 2, 2, 0]])
        assert torch.equal(getattr(wide, name), part[[1, 1, 1, 1]])
        assert getattr(half, name).dtype == torch.float16


def test_conditioning_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="batch of one"):
        conditioning(2).expand(4)
    with pytest.raises(ValueError, match="different layouts"):
        Conditioning.cat(conditioning(1), conditioning(1, sdxl=True))


def test_sizes_are_size_crop_target():
    sizes = size_conditioning((480, 640), (0, 80), (64, 32))
    assert sizes.dtype == torch.float32 and sizes.tolist() == [480, 640, 0, 80, 64, 32]
