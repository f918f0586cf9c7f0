"""Decoding with little memory."""

import tiny
import torch

from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher
from hypersd_pipeline.training.decoding import decoded_one_by_one


def test_decoding_again_gives_the_same_images_and_gradients(tmp_path):
    model = load_teacher(TeacherConfig(source=str(tiny.write_sd15(tmp_path))), parts=("vae",))
    decode, found = lambda z: model.decode(z, clip=False), []
    for draw in (lambda z: torch.cat([decode(one) for one in z.split(1)]), lambda z: decoded_one_by_one(decode, z)):
        z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        images = draw(z)
        images.square().mean().backward()
        found.append((images.detach(), z.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
