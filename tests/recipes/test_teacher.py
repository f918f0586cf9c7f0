"""The teacher's training: its formulas, and a tiny run from scenes to a folder that diffusers loads."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from hypersd_pipeline.config_loader import ProjectConfigLoader
from hypersd_pipeline.data.twemoji import TwemojiConfig, make_scene
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.files import tensors_sha256
from hypersd_pipeline.models.dual_encoder import load_dual_encoder, read_checked
from hypersd_pipeline.models.teacher import check_shipped
from hypersd_pipeline.pipelines.teacher import create_pipeline
from hypersd_pipeline.recipes.teacher import build, unet, vae
from hypersd_pipeline.recipes.teacher.config import DualEncoderTraining, QualityHeadTraining, TeacherTrainingConfig, UnetConfig, VaeConfig
from hypersd_pipeline.settings import CONFIG_LOADER_ARGS
from hypersd_pipeline.training.checkpoints import CheckpointStore

ROOT = Path(__file__).parents[2]
LOOP = {"steps": 2, "batch_size": 4, "learning_rate": 1e-3, "log_every": 1}
VAE = VaeConfig(
    block_out_channels=(8, 16, 16, 16), latent_channels=4, norm_num_groups=4, kl_weight=1e-5, mse_weight=10.0, ema_decay=0.998, loop=LOOP,
    decoder_loop=LOOP,
)  # fmt: skip
UNET = UnetConfig(
    block_out_channels=(16, 32), layers_per_block=1, attention_head_dim=2, norm_num_groups=4, text_width=16, text_layers=1, text_heads=2,
    vocabulary=700, max_tokens=36, ema_decay=0.997, loop=LOOP,
)  # fmt: skip
MODELS = {"vae": VAE, "unet": UNET, "dual_encoder": DualEncoderTraining(loop=LOOP), "quality_head": QualityHeadTraining(loop=LOOP)}


def test_whitening_keeps_the_reconstruction_and_normalises_the_latents():
    torch.manual_seed(0)
    model = vae.build_vae(VAE).eval()
    images = torch.randint(0, 256, (64, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.quant_conv.bias[:4] += torch.tensor([3.0, -1.0, 0.5, 2.0])
        model.quant_conv.weight[:4] *= 5
        pixels = vae.to_unit_range(images[:8])
        before = model.encode(pixels).latent_dist
        restored = model.decode(before.mean).sample
        std, scale = before.std, vae.encode_all(model, images)[0].std(dim=(0, 2, 3))
        vae.whiten_latents(model, images)
        after = model.encode(pixels).latent_dist
        everything = vae.encode_all(model, images)[0]
        assert torch.allclose(model.decode(after.mean).sample, restored, atol=1e-4)
        assert torch.allclose(after.std * scale[None, :, None, None], std, rtol=1e-3)
    assert torch.allclose(everything.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4)
    assert torch.allclose(everything.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-3)


def test_vae_loss_by_hand_on_a_perfect_standard_posterior():
    class Perfect:
        def encode(self, images):
            self.images = images
            moments = {"mean": torch.zeros(1), "std": torch.ones(1), "var": torch.ones(1), "logvar": torch.zeros(1)}
            return type("O", (), {"latent_dist": type("P", (), moments)})

        def decode(self, z):
            return type("O", (), {"sample": self.images + 0.5})

    loss, scalars = vae.vae_loss(
        Perfect(), torch.zeros(1, 3, 8, 8), torch.zeros(1), VAE.model_copy(update={"mse_weight": 2.0, "kl_weight": 7.0})
    )
    assert loss.item() == pytest.approx(0.5 + 2 * 0.25)
    assert scalars["kl"].item() == 0
    assert scalars["psnr"].item() == pytest.approx(12.0412, abs=1e-3)  # error 0.5 of a range of 2


def test_tokenizer_is_clips_and_represents_new_words():
    tokenizer = unet.build_tokenizer(["a fox on the left, blue background", "an owl at the top, red background"] * 4, UNET)
    ids = tokenizer("An OWL on the xylophone!").input_ids
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "anowlonthexylophone!"
    assert unet.tokenize(tokenizer, [""]).shape == (1, UNET.max_tokens)


def test_tokenizer_is_the_same_every_time():
    """The library numbers letters at the ends of words in a random order unless told: a resumed training would see other words."""
    captions = [f"{a} {b} on the left" for a in ("red", "blue", "green") for b in ("fox", "owl", "whale", "zebra")]

    def made():
        tokenizer = unet.build_tokenizer(captions, UNET)
        return tokenizer.get_vocab(), json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]

    first = made()
    assert len(first[1]) > 10 and all(made() == first for _ in range(4))


def test_tiny_run_ends_in_a_stable_diffusion_folder(tmp_path):
    config = TeacherTrainingConfig(data=TwemojiConfig(train=12, val=2, test=6, test_unseen=4), **MODELS)
    data, out = tmp_path / "data", tmp_path / "teacher"
    data.mkdir()
    build.generate_scenes(config)(data)
    seen = []
    store = [CheckpointStore(tmp_path / name) for name in ("vae", "unet", "decoder")]
    autoencoder = build.vae_from_scenes(data, config, store[0], lambda m, s: seen.append(m))
    latents = build.latents_from_scenes(data, autoencoder)
    denoiser = build.denoiser_from_scenes(data, latents, config, store[1], lambda m, s: seen.append(m))
    encoder = {k: v.clone() for k, v in autoencoder.encoder.state_dict().items()}
    autoencoder = build.decoder_from_scenes(data, autoencoder, latents, config, store[2], lambda m, s: seen.append(m))
    assert all(torch.equal(v, encoder[k]) for k, v in autoencoder.encoder.state_dict().items())
    metrics = build.measure_vae(data, autoencoder)
    assert 0 < metrics["vae_psnr_test"] < 40 and metrics["vae_psnr_test_n"] == 6
    build.export_teacher(autoencoder, denoiser, metrics, config)(out)
    assert {"loss", "psnr", "images_per_second"} <= set(seen[0])
    assert json.loads((out / "recipe.json").read_text())["config"]["data"]["train"] == 12
    check_shipped(out)
    grid = build.sample_teacher(out, data, config)
    assert grid.width == 8 * 132 and np.asarray(grid)[:128, :128].std() > 0
    pipeline = StableDiffusionPipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a fox", num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images
    assert image.shape == (1, 64, 64, 3)


def test_tiny_encoders_end_in_their_files(tmp_path):
    config = TeacherTrainingConfig(data=TwemojiConfig(train=12, val=2, test=6, test_unseen=4), encoder_images=10, **MODELS)
    data, out = tmp_path / "data", tmp_path / "encoders"
    data.mkdir()
    out.mkdir()
    build.generate_scenes(config)(data)
    store = [CheckpointStore(tmp_path / name) for name in ("encoder", "head")]
    encoder, metrics = build.dual_encoder_from_scenes(data, config, store[0], lambda m, s: None)
    assert metrics.keys() == {
        "dual_encoder_loss", *(f"dual_encoder_r_at_1_{name}" for name in ("test", "test_n", "test_unseen", "test_unseen_n")),
    }  # fmt: skip
    assert (metrics["dual_encoder_r_at_1_test_n"], metrics["dual_encoder_r_at_1_test_unseen_n"]) == (6, 4)
    head, accuracy = build.quality_head_from_scenes(data, encoder, config, store[1], lambda m, s: None)
    build.export_encoders(encoder, head, metrics, accuracy, config)(out)
    loaded = load_dual_encoder(out / "dual_encoder.safetensors")
    assert tensors_sha256(loaded.trained_tensors()) == tensors_sha256(encoder.trained_tensors())
    _, metadata = read_checked(out / "quality_head.safetensors")
    assert json.loads(metadata["recipe"])["training"]["loop"]["steps"] == 2


def test_captioned_images_are_read_in_order_and_missing_ones_are_named(tmp_path):
    config = TeacherTrainingConfig(data=TwemojiConfig(train=5, val=1, test=1, test_unseen=1), **MODELS)
    with pytest.raises(UserError, match=r"captions_train\.json"):
        build.read_captioned_images(tmp_path, "train")
    build.generate_scenes(config)(tmp_path)
    images, captions = build.read_captioned_images(tmp_path, "train")
    assert images.shape == (5, 64, 64, 3) and images.dtype == torch.uint8
    scene = make_scene(config.data, "train", 1)
    assert np.array_equal(images[1], scene.image) and captions[1] == scene.caption
    few, first = build.read_captioned_images(tmp_path, "train", 2)
    assert torch.equal(few, images[:2]) and first == captions[:2]


def test_configuration_is_valid():
    values = ProjectConfigLoader(str(ROOT / "conf"), env="base", **CONFIG_LOADER_ARGS)["parameters"]
    config = TeacherTrainingConfig(**values["teacher_training"])
    assert (config.dual_encoder.loop.batch_size, config.quality_head.loop.steps) == (512, 1500)


def test_each_training_has_checkpoints_and_a_metric_stream():
    stages = ("vae", "decoder", "unet", "dual_encoder", "quality_head")
    handles = {f"teacher_{stage}.{handle}" for stage in stages for handle in ("checkpoints", "metric_stream")}
    pipeline = create_pipeline()
    assert pipeline.inputs() == {"params:teacher_training"} | handles
    assert {"teacher_training_grid", "encoders_folder"} <= pipeline.outputs()
