"""Wiring of the teacher's training."""

from kedro.pipeline import Node, Pipeline

from hypersd_pipeline.pipelines.teacher import nodes


def create_pipeline(**kwargs: object) -> Pipeline:
    """Scenes -> autoencoder -> denoiser and text encoder -> a diffusers folder with recipe and checksums; dual encoder and quality head."""
    config = "params:teacher_training"
    return Pipeline(
        [
            Node(nodes.generate_scenes, config, "teacher_dataset", name="generate_scenes"),
            Node(
                nodes.train_vae,
                {
                    "dataset": "teacher_dataset",
                    "config": config,
                    "checkpoints": "teacher_vae.checkpoints",
                    "metric_stream": "teacher_vae.metric_stream",
                },
                "teacher_vae",
                name="train_vae",
            ),
            Node(nodes.encode_latents, ["teacher_dataset", "teacher_vae"], "teacher_latents", name="encode_latents"),
            Node(
                nodes.train_unet,
                {
                    "dataset": "teacher_dataset",
                    "latents": "teacher_latents",
                    "config": config,
                    "checkpoints": "teacher_unet.checkpoints",
                    "metric_stream": "teacher_unet.metric_stream",
                },
                "teacher_denoiser",
                name="train_unet",
            ),
            Node(
                nodes.train_decoder,
                {
                    "dataset": "teacher_dataset",
                    "vae": "teacher_vae",
                    "latents": "teacher_latents",
                    "config": config,
                    "checkpoints": "teacher_decoder.checkpoints",
                    "metric_stream": "teacher_decoder.metric_stream",
                },
                "teacher_vae_tuned",
                name="train_decoder",
            ),
            Node(nodes.measure_vae, ["teacher_dataset", "teacher_vae_tuned"], "teacher_figures", name="measure_vae"),
            Node(
                nodes.export_teacher,
                ["teacher_vae_tuned", "teacher_denoiser", "teacher_figures", config],
                "teacher_folder",
                name="export_teacher",
            ),
            Node(nodes.sample_teacher, ["teacher_folder", "teacher_dataset", config], "teacher_training_grid", name="sample_teacher"),
            Node(
                nodes.train_dual_encoder, ["teacher_dataset", config], ["dual_encoder", "dual_encoder_figures"], name="train_dual_encoder"
            ),
            Node(
                nodes.train_quality_head,
                ["teacher_dataset", "dual_encoder", config],
                ["quality_head", "quality_head_figures"],
                name="train_quality_head",
            ),
            Node(
                nodes.export_encoders,
                ["dual_encoder", "quality_head", "dual_encoder_figures", "quality_head_figures", config],
                "encoders_folder",
                name="export_encoders",
            ),
        ]
    )
