"""What the default has no published files for: ControlNets, a second base and a style LoRA for the small teacher, each in minutes."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.data.cache import LatentCache
from hypersd_pipeline.data.cache_build import select_rows
from hypersd_pipeline.data.config import DataConfig
from hypersd_pipeline.data.images import fit
from hypersd_pipeline.data.memory import MemoryRows
from hypersd_pipeline.data.openmoji import write_scenes
from hypersd_pipeline.data.rows import Manifest
from hypersd_pipeline.data.stored import load_row
from hypersd_pipeline.diffusion.process import Process
from hypersd_pipeline.draws import rand, randint, randn
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.files import replacing_folder, write_tensors
from hypersd_pipeline.metrics.edges import Detector, condition_of, edges_of
from hypersd_pipeline.models.adapters import AdaptedBackbone
from hypersd_pipeline.models.controlnet import controlled, new_controlnet
from hypersd_pipeline.models.teacher import Teacher, TeacherConfig, load_teacher
from hypersd_pipeline.objectives.denoising import epsilon_loss
from hypersd_pipeline.recipes.compatibility.config import CompatibilityConfig, ControlConfig, StyleConfig
from hypersd_pipeline.recipes.stage import Outputs
from hypersd_pipeline.recipes.teacher.build import read_captioned_images
from hypersd_pipeline.training.checkpoints import CheckpointStore, Identity
from hypersd_pipeline.training.loop import LoopConfig, make_accelerator, train

GAMMA = 5.0
"""Of the min-SNR weights, as in the shipped teacher's training."""
CONTROLNET, BASE, STYLE = "controlnet_{}", "base_{}", "style_{}"
"""Folders of the parts, by name."""
STYLE_WEIGHTS = "pytorch_lora_weights.safetensors"

Forward = Callable[[Tensor, Tensor, Conditioning, Tensor], Tensor]
"""``(x_t, t, cond, rows) -> output``: a network that is trained, on rows of the data."""
Writer = Callable[[Path], None]


def style_scenes(compatibility: CompatibilityConfig) -> Writer:
    """A writer of the embedded scenes in OpenMoji's style. Of nothing where no entry is trained on them."""
    if not any(compatibility.in_style()):
        return lambda folder: None
    return functools.partial(write_scenes, config=compatibility.scenes)


def train_parts(
    manifest: Manifest,
    data: DataConfig,
    latents: LatentCache,
    scenes: Path,
    teacher: TeacherConfig,
    compatibility: CompatibilityConfig,
    outputs: Outputs,
) -> Writer:
    """Train every entry that has no source, one after the other. Each has checkpoints of its own, and continues from them.

    Args:
        scenes: what `style_scenes` wrote.

    Returns:
        A writer of a folder with ``controlnet_<name>``, ``base_<name>`` and ``style_<name>``, each as diffusers reads it.

    Raises:
        UserError: the cache was made by another teacher, or has no images.
    """
    writers: dict[str, Writer] = {}
    trainings = _trainings(manifest, data, latents, scenes, teacher, compatibility)
    before = 0
    for folder, (loop, run) in trainings.items():
        writers[folder] = run(_for_part(outputs, folder, before))
        before += loop.steps
    return functools.partial(_write, writers=writers)


def _trainings(
    manifest: Manifest, data: DataConfig, latents: LatentCache, scenes: Path, teacher: TeacherConfig, compatibility: CompatibilityConfig
) -> dict[str, tuple[LoopConfig, Callable[[Outputs], Writer]]]:
    """By the part's folder: the loop, and the training."""
    found: dict[str, tuple[LoopConfig, Callable[[Outputs], Writer]]] = {}
    for name, control in compatibility.active_controlnets().items():
        if control.loop is not None:
            run = functools.partial(_train_controlnet, manifest, data, latents, teacher, control, compatibility)
            found[CONTROLNET.format(name)] = control.loop, run
    rows = style_rows(scenes, teacher) if any(compatibility.in_style()) else None
    for name, base in compatibility.active_bases().items():
        if base.loop is not None and rows is not None:
            found[BASE.format(name)] = base.loop, functools.partial(_train_base, rows, teacher, base.loop, compatibility)
    for name, style in compatibility.active_styles().items():
        if style.loop is not None and rows is not None:
            found[STYLE.format(name)] = style.loop, functools.partial(_train_style, rows, teacher, style, compatibility)
    return found


def _for_part(outputs: Outputs, name: str, before: int) -> Outputs:
    """Checkpoints in a folder of the part's own, and metrics with the part's name in front, at steps after those of the parts before."""
    store = CheckpointStore(outputs.checkpoints.path / name, outputs.checkpoints.keep, outputs.checkpoints.restart)
    return Outputs(store, lambda values, step: outputs.metrics({f"{name}_{key}": value for key, value in values.items()}, before + step))


def _write(folder: Path, writers: Mapping[str, Writer]) -> None:
    with replacing_folder(folder) as whole:
        for name, write in writers.items():
            (whole / name).mkdir()
            write(whole / name)


@torch.no_grad()
def style_rows(scenes: Path, teacher: TeacherConfig, split: str = "train") -> MemoryRows:
    """Latents and conditioning of the scenes in OpenMoji's style, as the teacher's encoders give them."""
    model = load_teacher(teacher, parts=("vae", "text"))
    pixels, captions = read_captioned_images(scenes, split)
    means = [model.encode_images(batch.permute(0, 3, 1, 2).float() / 127.5 - 1)[0].float().cpu() for batch in pixels.split(64)]
    cond, uncond = model.encode_prompts(captions).to("cpu", torch.float32), model.unconditional().to("cpu", torch.float32)
    return MemoryRows(torch.cat(means), cond, uncond, captions)


# --- one training for each kind ----------------------------------------------------------------------------------------------------------


def _train_controlnet(
    manifest: Manifest,
    data: DataConfig,
    latents: LatentCache,
    teacher: TeacherConfig,
    control: ControlConfig,
    compatibility: CompatibilityConfig,
    outputs: Outputs,
) -> Writer:
    """The network is frozen. The ControlNet learns to add what the condition tells."""
    assert control.loop is not None
    loop, accelerator = control.loop, make_accelerator(control.loop)
    model = load_teacher(teacher, parts=("backbone",), device=accelerator.device)
    latents.require_teacher(model)
    split = latents.split("train")
    if not split.has_images:
        raise UserError("compatibility.controlnets: a data source of kind 'prompts' has no images; give a source.")
    rows = select_rows(manifest.splits["train"], data)
    network = new_controlnet(model.backbone, model.resolution // model.latent_shape[1], loop.seed)
    network.to(accelerator.device).train().requires_grad_(True)

    def forward(x_t: Tensor, t: Tensor, cond: Conditioning, picks: Tensor) -> Tensor:
        images = (fit(load_row(manifest, rows[i]), model.resolution)[0] for i in picks.tolist())
        condition = torch.stack([condition_of_pixels(torch.from_numpy(image), control.detector) for image in images])
        return controlled(model.backbone, network, x_t, t, cond, condition.to(x_t.device))

    parts = {"kind": "controlnet", "detector": control.detector, "data": latents.key}
    state = {"network": network}
    _denoise("ControlNet", forward, split, model, loop, compatibility, outputs, accelerator, state, parts, cubic=True)
    return functools.partial(network.to("cpu").eval().save_pretrained, safe_serialization=True)


def condition_of_pixels(pixels: Tensor, detector: Detector) -> Tensor:
    """The condition ``[3, h, w]`` of an 8-bit image ``[h, w, 3]``."""
    return condition_of(edges_of(pixels.permute(2, 0, 1).float() / 255, detector), detector)


def _train_base(rows: MemoryRows, teacher: TeacherConfig, loop: LoopConfig, compatibility: CompatibilityConfig, outputs: Outputs) -> Writer:
    """All weights of the network are trained. The other parts stay the teacher's."""
    accelerator = make_accelerator(loop)
    held = teacher.model_copy(update={"dtype": "float32"})  # in bf16 small updates would round away
    model = load_teacher(held, parts=("backbone",), device=accelerator.device)
    model.backbone.module.requires_grad_(True)
    state = {"network": model.backbone.module}
    _denoise("base", _plain(model), rows, model, loop, compatibility, outputs, accelerator, state, {"kind": "base"})
    model.backbone.module.requires_grad_(False).to("cpu")
    return functools.partial(_write_base, model=model)


def _write_base(folder: Path, model: Teacher) -> None:
    """The teacher's folder with another network. Files that describe the teacher's training stay behind."""
    component = model.backbone.component
    for path in model.folder.iterdir():
        if path.is_dir() and path.name != component:
            shutil.copytree(path, folder / path.name)
    shutil.copy(model.folder / "model_index.json", folder)
    model.backbone.module.save_pretrained(folder / component, safe_serialization=True)


def _train_style(
    rows: MemoryRows, teacher: TeacherConfig, style: StyleConfig, compatibility: CompatibilityConfig, outputs: Outputs
) -> Writer:
    """A LoRA on the frozen network."""
    assert style.loop is not None and style.lora is not None
    loop, accelerator = style.loop, make_accelerator(style.loop)
    model = load_teacher(teacher, parts=("backbone",), device=accelerator.device)
    adapters = AdaptedBackbone(
        model.backbone,
        model.process,
        rank=style.lora.rank,
        target_modules=style.lora.target_modules,
        names=("student",),
        seed=loop.seed,
    )
    adapters.use("student")
    parts = {"kind": "style", "lora": style.lora.model_dump(mode="json")}
    _denoise("style", _plain(model), rows, model, loop, compatibility, outputs, accelerator, {"adapters": adapters}, parts)
    lora = adapters.export("student", {"format": "pt"})
    return lambda folder: write_tensors(folder / STYLE_WEIGHTS, lora.tensors, lora.metadata)


def _plain(model: Teacher) -> Forward:
    return lambda x_t, t, cond, picks: model.backbone(x_t, t, cond)


def _denoise(
    name: str,
    forward: Forward,
    rows: Any,
    model: Teacher,
    loop: LoopConfig,
    compatibility: CompatibilityConfig,
    outputs: Outputs,
    accelerator: Accelerator,
    state: Mapping[str, Any],
    parts: Mapping[str, Any],
    cubic: bool = False,
) -> None:
    """The denoising objective (`objectives.denoising`) on rows of the data, with captions dropped at random."""
    (trained,) = state.values()
    parameters = trained.parameters("student") if isinstance(trained, AdaptedBackbone) else list(trained.parameters())
    identity = {
        **parts,
        "loop": loop.identity(),
        "teacher": model.content_hash("backbone"),
        "caption_dropout": compatibility.caption_dropout,
        **({} if "data" in parts else {"scenes": compatibility.scenes.model_dump(mode="json"), "vae": model.content_hash("vae")}),
    }
    train(
        name,
        parameters=parameters,
        loss_fn=functools.partial(denoising_loss, forward, rows, model.process, model.device, loop, compatibility.caption_dropout, cubic),
        config=loop,
        state=state,
        key=Identity(identity),
        checkpoints=outputs.checkpoints,
        metrics=outputs.metrics,
        accelerator=accelerator,
    )


def denoising_loss(
    forward: Forward,
    rows: Any,
    process: Process,
    device: torch.device,
    loop: LoopConfig,
    caption_dropout: float,
    cubic: bool,
    generator: torch.Generator,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss on a random batch of rows (`data.cache.SplitCache` or `MemoryRows`).

    Args:
        cubic: draw more of the large timesteps, where the layout is decided: ``t = (1 - u^3) T`` (T2I-Adapter, arXiv 2302.08453, 3.5).
    """
    batch = loop.batch_size // loop.accumulate
    picks = randint(0, len(rows), (batch,), generator)
    x0 = rows.sample(picks, generator)
    z = randn(x0.shape, generator).to(device)
    if cubic:
        t = (process.num_train_timesteps * (1 - rand((batch,), generator) ** 3)).long().clamp(max=process.last_timestep).to(device)
    else:
        t = randint(0, process.num_train_timesteps, (batch,), generator).to(device)
    dropped = (rand((batch,), generator) < caption_dropout).long()
    cond = rows.conditioning(picks, generator)
    cond = Conditioning.cat(cond, rows.unconditional(batch, cond.sizes))[torch.arange(batch) + batch * dropped].to(device)
    x0 = x0.to(device)
    x_t = process.add_noise(x0, z, t)
    eps = process.to_x0_eps(forward(x_t, t, cond, picks), x_t, t)[1]
    return epsilon_loss(eps, z, t, process, GAMMA), {}
