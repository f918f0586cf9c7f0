"""Wiring of the teacher's training."""

from collections.abc import Callable
from typing import Any

from kedro.pipeline import Node, Pipeline

from hypersd_pipeline.recipes.teacher import build

CONFIG = "params:teacher_training"


def _training(stage: str, function: Callable[..., Any], outputs: str | list[str], name: str, inputs: dict[str, str] | None = None) -> Node:
    """A node that trains on the data set, with the checkpoints and the metric stream of ``teacher_<stage>``."""
    handles = {handle: f"teacher_{stage}.{handle}" for handle in ("checkpoints", "metric_stream")}
    return Node(function, {"dataset": "teacher_dataset", "config": CONFIG, **(inputs or {}), **handles}, outputs, name=name)


def create_pipeline(**kwargs: object) -> Pipeline:
    """Scenes -> autoencoder -> denoiser and text encoder -> a diffusers folder with recipe and checksums.

    Scenes -> dual encoder -> image-quality head -> a folder with both.
    """
    latents = {"latents": "teacher_latents"}
    return Pipeline(
        [
            Node(build.generate_scenes, CONFIG, "teacher_dataset", name="generate_scenes"),
            _training("vae", build.vae_from_scenes, "teacher_vae", "train_vae"),
            Node(build.latents_from_scenes, ["teacher_dataset", "teacher_vae"], "teacher_latents", name="encode_latents"),
            _training("unet", build.denoiser_from_scenes, "teacher_denoiser", "train_denoiser", latents),
            _training("decoder", build.decoder_from_scenes, "teacher_vae_tuned", "train_decoder", {"vae": "teacher_vae", **latents}),
            Node(build.measure_vae, ["teacher_dataset", "teacher_vae_tuned"], "teacher_vae_metrics", name="measure_vae"),
            Node(
                build.export_teacher,
                ["teacher_vae_tuned", "teacher_denoiser", "teacher_vae_metrics", CONFIG],
                "teacher_folder",
                name="export_teacher",
            ),
            Node(build.sample_teacher, ["teacher_folder", "teacher_dataset", CONFIG], "teacher_training_grid", name="sample_teacher"),
            _training("dual_encoder", build.dual_encoder_from_scenes, ["dual_encoder", "dual_encoder_metrics"], "train_dual_encoder"),
            _training(
                "quality_head",
                build.quality_head_from_scenes,
                ["quality_head", "quality_head_metrics"],
                "train_quality_head",
                {"encoder": "dual_encoder"},
            ),
            Node(
                build.export_encoders,
                ["dual_encoder", "quality_head", "dual_encoder_metrics", "quality_head_metrics", CONFIG],
                "encoders_folder",
                name="export_encoders",
            ),
        ]
    )
