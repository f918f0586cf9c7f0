"""Train the shipped teacher's autoencoder."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from hypersd_pipeline.files import fingerprint
from hypersd_pipeline.recipes.teacher.config import VaeConfig
from hypersd_pipeline.training.checkpoints import CheckpointStore
from hypersd_pipeline.training.ema import ema_update
from hypersd_pipeline.training.loop import MetricSink, make_accelerator, train

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


def build_vae(config: VaeConfig, image_size: int = 64) -> AutoencoderKL:
    """A randomly initialised ``AutoencoderKL``, without attention, so that it is local and quick."""
    from diffusers import AutoencoderKL

    levels = len(config.block_out_channels)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_num_groups,
        sample_size=image_size,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )
    return _initialise(vae, config.latent_channels)


@torch.no_grad()
def _initialise(vae: AutoencoderKL, latent_channels: int) -> AutoencoderKL:
    """He's gain, and a posterior that starts almost without noise.

    PyTorch's default weights have a sixth of He's variance, so that the residual branches begin nearly silent and the latents drown in
    the posterior's initial noise. In short trials, not kept, the reconstruction was several dB behind after the first minute.
    """
    for name, module in vae.named_modules():
        if isinstance(module, torch.nn.Conv2d) and "conv_out" not in name:
            module.weight *= 6**0.5
    vae.quant_conv.weight[latent_channels:] = 0
    vae.quant_conv.bias[latent_channels:] = -6
    return vae


def random_crops(images: Tensor, size: int, step: int, generator: torch.Generator) -> Tensor:
    """One ``size`` x ``size`` window of each image ``[n, h, w, 3]``, at multiples of ``step``."""
    places = (images.shape[1] - size) // step + 1
    corners = step * torch.randint(places, (len(images), 2), generator=generator)
    return torch.stack([image[y : y + size, x : x + size] for image, (y, x) in zip(images, corners.tolist(), strict=True)])


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 ``[b, h, w, 3]`` to float32 ``[b, 3, h, w]`` in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def vae_loss(vae: AutoencoderKL, images: Tensor, noise: Tensor, config: VaeConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """``mean|x - D(z)| + a mean(x - D(z))^2 + b KL(q(z|x) || N(0, 1))`` (KL averaged per latent element).

    Args:
        images: float32 ``[b, 3, h, w]`` in [-1, 1].
        noise: standard normal, of the latents' shape ``[b, c, h/8, w/8]``.

    Returns:
        The loss, and ``psnr`` (in dB) and ``kl``, detached.
    """
    posterior = vae.encode(images).latent_dist
    reconstruction = vae.decode(posterior.mean + posterior.std * noise).sample
    absolute, squared = F.l1_loss(reconstruction, images), F.mse_loss(reconstruction, images)
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    psnr = -10 * torch.log10(squared.detach() / 4)  # images span 2
    return absolute + config.mse_weight * squared + config.kl_weight * kl, {"psnr": psnr, "kl": kl.detach()}


def train_vae(images: Tensor, config: VaeConfig, data_key: str, checkpoints: CheckpointStore, metrics: MetricSink) -> AutoencoderKL:
    """Train the autoencoder.

    Args:
        images: uint8 ``[n, h, w, 3]``.
        data_key: names the images: a checkpoint made on other ones is not continued.

    Returns:
        The averaged weights on the CPU, with unit-variance latents (see `whiten_latents`).
    """
    accelerator = make_accelerator(config.loop)
    torch.manual_seed(config.loop.seed)
    vae = build_vae(config, images.shape[1]).to(accelerator.device)
    average = copy.deepcopy(vae).requires_grad_(False)
    parameters, averaged = list(vae.parameters()), list(average.parameters())
    batch = config.loop.batch_size // config.loop.accumulate
    reduction = 2 ** (len(config.block_out_channels) - 1)
    per_image = (images.shape[1] // config.crop) ** 2

    def loss_fn(generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        # the network is local: windows teach as much at a fraction of the cost. Whole images keep the group norms' statistics right
        whole = bool(torch.rand((), generator=generator) < config.whole_images)
        picks = torch.randint(len(images), (batch if whole else batch * per_image,), generator=generator)
        pixels = images[picks] if whole else random_crops(images[picks], config.crop, reduction, generator)
        side = pixels.shape[1] // reduction
        noise = torch.randn(len(pixels), config.latent_channels, side, side, generator=generator)
        return vae_loss(vae, to_unit_range(pixels).to(accelerator.device), noise.to(accelerator.device), config)

    train(
        "vae",
        parameters=parameters,
        loss_fn=loss_fn,
        config=config.loop,
        state={"vae": vae, "average": average},
        key=fingerprint("vae", config.identity(), data_key),
        checkpoints=checkpoints,
        metrics=metrics,
        accelerator=accelerator,
        after_update=lambda: ema_update(averaged, parameters, config.ema_decay),
    )
    return whiten_latents(average.cpu().eval(), images[:4096])


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior mean and std of uint8 ``[n, h, w, 3]``: two float32 ``[n, c, h/8, w/8]``."""
    posteriors = [vae.encode(to_unit_range(batch)).latent_dist for batch in images.split(64)]
    return torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors])


def train_decoder(
    vae: AutoencoderKL,
    images: Tensor,
    latents: tuple[Tensor, Tensor],
    config: VaeConfig,
    data_key: str,
    checkpoints: CheckpointStore,
    metrics: MetricSink,
) -> AutoencoderKL:
    """Train the decoder alone for ``config.decoder_loop``, on whole images and their latents.

    The latents stay what they are, so that the denoiser can be trained on them at the same time.

    Args:
        vae: is not changed.
        images: uint8 ``[n, h, w, 3]``.
        latents: the images' posterior mean and std (`encode_all`).
        data_key: names the images.

    Returns:
        A new autoencoder on the CPU with the averaged weights, or ``vae`` itself where there is no ``decoder_loop``.
    """
    if config.decoder_loop is None:
        return vae
    loop = config.decoder_loop
    accelerator = make_accelerator(loop)
    mean, std = latents
    tuned = copy.deepcopy(vae).to(accelerator.device).train().requires_grad_(True)
    average = copy.deepcopy(tuned).requires_grad_(False)
    parameters = [*tuned.decoder.parameters(), *tuned.post_quant_conv.parameters()]
    averaged = [*average.decoder.parameters(), *average.post_quant_conv.parameters()]
    batch = loop.batch_size // loop.accumulate

    def loss_fn(generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        picks = torch.randint(len(images), (batch,), generator=generator)
        z = mean[picks] + std[picks] * torch.randn(batch, *mean.shape[1:], generator=generator)
        pixels = to_unit_range(images[picks]).to(accelerator.device)
        restored = tuned.decode(z.to(accelerator.device)).sample
        squared = F.mse_loss(restored, pixels)
        return F.l1_loss(restored, pixels) + config.mse_weight * squared, {"psnr": -10 * torch.log10(squared.detach() / 4)}

    train(
        "decoder",
        parameters=parameters,
        loss_fn=loss_fn,
        config=loop,
        state={"decoder": tuned.decoder, "post": tuned.post_quant_conv, "average": average},
        key=fingerprint("decoder", config.identity(), loop.identity(), data_key),
        checkpoints=checkpoints,
        metrics=metrics,
        accelerator=accelerator,
        after_update=lambda: ema_update(averaged, parameters, config.ema_decay),
    )
    return average.cpu().eval()


@torch.no_grad()
def whiten_latents(vae: AutoencoderKL, images: Tensor) -> AutoencoderKL:
    """Give each latent channel zero mean and unit variance by folding the affine map into the 1 x 1 ``quant_conv`` and ``post_quant_conv``.

    Stable Diffusion's single ``scaling_factor`` does so for all channels at once. The reconstruction is unchanged.

    Args:
        vae: is changed in place, and returned.
        images: uint8 ``[n, h, w, 3]``.
    """
    means = torch.cat([vae.encode(to_unit_range(b)).latent_dist.mean for b in images.split(64)])
    shift, scale = means.mean(dim=(0, 2, 3)), means.std(dim=(0, 2, 3))
    channels = len(shift)
    quant, post = vae.quant_conv, vae.post_quant_conv
    post.bias += post.weight[:, :, 0, 0] @ shift  # decode(scale z + shift) first, while the weight is the old one
    post.weight *= scale[None, :, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - shift) / scale
    quant.weight[:channels] /= scale[:, None, None, None]
    quant.bias[channels:] -= 2 * scale.log()  # the second half is the log variance
    return vae
