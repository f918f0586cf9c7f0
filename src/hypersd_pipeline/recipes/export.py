"""A trained model as files for others: diffusers, kohya's layout, the fused network, ONNX, and a model card."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.export.card import GRID, card, count_steps, usage
from hypersd_pipeline.export.comfyui import as_json, workflow
from hypersd_pipeline.export.kohya import cast, kohya_metadata, to_kohya
from hypersd_pipeline.export.onnx import write_onnx
from hypersd_pipeline.export.release import ExportConfig, Release, check_export, release_of
from hypersd_pipeline.files import replacing_folder, share, write_tensors, write_text
from hypersd_pipeline.models.backbones import Backbone
from hypersd_pipeline.models.lora import LoRA, merge_lora
from hypersd_pipeline.models.one_step import CONTRACT, read_contract, read_network
from hypersd_pipeline.models.teacher import Teacher, TeacherConfig, load_teacher
from hypersd_pipeline.models.user_lora import read_user_lora

log = logging.getLogger(__name__)

WEIGHTS, SCHEDULER, WORKFLOWS = "pytorch_lora_weights.safetensors", "scheduler_config.json", "comfyui"


@dataclass(frozen=True)
class _Export:
    """What the parts of an export share."""

    config: ExportConfig
    teacher: Teacher
    release: Release
    metrics: Mapping[str, Any]
    grid: Image


def export_lora(
    lora: LoRA, teacher: TeacherConfig, export: ExportConfig, metrics: Mapping[str, Any], grid: Image
) -> Callable[[Path], None]:
    """A writer of a LoRA's folder.

    Args:
        metrics, grid: of the LoRA's evaluation, for the card.

    Raises:
        UserError: a format is not possible, or the LoRA has no contract that can be read. That is said before anything is computed.
    """
    model = _load(teacher, export)
    release = release_of(export, model, lora.metadata.get("sampling_contract"), lora.metadata, lora=True)
    if "kohya" in export.formats:
        to_kohya(lora, model.backbone)  # whether each module has a name
    return lambda path: _write(path, _Export(export, model, release, metrics, grid), lora)


def export_network(
    network: Path, teacher: TeacherConfig, export: ExportConfig, metrics: Mapping[str, Any], grid: Image
) -> Callable[[Path], None]:
    """A writer of the folder of a whole network, the dedicated one-step UNet. It has no LoRA, so the network itself is always written.

    Args:
        network: the folder that its training wrote. metrics, grid: see `export_lora`.

    Raises:
        UserError: as `export_lora`, or the network cannot be read.
    """
    export = export.model_copy(update={"formats": ("unet", *(kind for kind in export.formats if kind == "onnx"))})
    model = _load(teacher, export)
    told = read_contract(network)
    text = json.dumps({key: told[key] for key in ("guidance_scale", "scheduler", "scheduler_config", "steps", "timesteps")}, sort_keys=True)
    release = release_of(export, model, text, {key: str(value) for key, value in told.items()}, lora=False)
    read_network(network, model.backbone)
    return lambda path: _write(path, _Export(export, model, release, metrics, grid), None)


def _load(teacher: TeacherConfig, export: ExportConfig) -> Teacher:
    """The teacher in float32 on the CPU: merging is exact there, and onnxruntime is compared with it."""
    check_export(export, load_teacher(teacher, parts=(), device="cpu").hub_id)
    parts = ("backbone", "text") if "onnx" in export.formats else ("backbone",)
    return load_teacher(teacher.model_copy(update={"dtype": "float32"}), parts=parts, device="cpu")  # type: ignore[arg-type]


def _write(path: Path, export: _Export, lora: LoRA | None) -> None:
    """Write all formats, the contract and the card. The folder at ``path`` is replaced as a whole."""
    config, release, backbone = export.config, export.release, export.teacher.backbone
    files: dict[str, str] = {}
    with replacing_folder(path) as folder:
        if lora is not None:
            files |= _write_lora(folder, export, cast(lora, config.dtype))
            merge_lora(backbone.module, lora)
        if "onnx" in config.formats:
            (folder / "onnx").mkdir()
            write_onnx(folder / "onnx", backbone, *_example(export.teacher), metadata=release.metadata)
            files["onnx/"] = "the network as ONNX, with its comparison with PyTorch in `check.json`"
        if "unet" in config.formats:
            _write_network(folder / backbone.component, backbone, config.dtype)
            files[f"{backbone.component}/"] = "the network with the LoRA merged into it" if lora is not None else "the network"
        files |= _write_workflows(folder, release)
        scheduler = {"_class_name": release.contract["scheduler"], **release.contract["scheduler_config"]}
        (folder / SCHEDULER).write_text(json.dumps(scheduler, indent=2) + "\n")
        contract = {"name": release.name, **release.contract, "timesteps_by_steps": release.timesteps, **release.provenance}
        (folder / CONTRACT).write_text(json.dumps(contract, indent=2, sort_keys=True) + "\n")
        export.grid.save(folder / GRID, format="PNG")
        files |= {SCHEDULER: "the scheduler for diffusers", CONTRACT: "how to sample, for programs", GRID: "samples"}
        hub_id = f"{config.push_to_hub}/{release.name}" if config.push_to_hub else f"path/to/{path.name}"
        (folder / "README.md").write_text(card(release, export.metrics, files, hub_id) + "\n", encoding="utf-8")
    log.info("Exported %s to %s.", release.name, path)


def _write_lora(folder: Path, export: _Export, lora: LoRA) -> dict[str, str]:
    """The LoRA in diffusers' and in kohya's layout. What is written is read back by diffusers and compared."""
    release, backbone, files = export.release, export.teacher.backbone, {}
    if "diffusers" in export.config.formats:
        adapter = {"r": lora.rank, "lora_alpha": lora.rank, "target_modules": sorted(lora.modules())}
        adapter = {f"{lora.component}.{key}": value for key, value in adapter.items()}
        metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(adapter, sort_keys=True), **release.metadata}
        write_tensors(folder / WEIGHTS, lora.tensors, metadata)
        _check_readable(folder / WEIGHTS, lora, backbone)
        files[WEIGHTS] = "the LoRA for diffusers"
    if "kohya" in export.config.formats:
        name, tensors = f"{release.name}.safetensors", to_kohya(lora, backbone)
        write_tensors(folder / name, tensors, {"format": "pt", **kohya_metadata(release, tensors, usage(release))})
        _check_readable(folder / name, lora, backbone)
        files[name] = "the LoRA for ComfyUI, A1111 and sd-scripts"
    return files


def _write_workflows(folder: Path, release: Release) -> dict[str, str]:
    """The contract as workflows of ComfyUI, one for each number of steps. It cannot load the small teacher."""
    made = {} if release.small else {steps: workflow(release, steps) for steps in release.timesteps}
    texts = {f"{count_steps(steps).replace(' ', '')}.json": as_json(nodes) for steps, nodes in made.items() if nodes is not None}
    for name, text in texts.items():
        write_text(folder / WORKFLOWS / name, text)
    return {f"{WORKFLOWS}/": "the sampling contract as workflows of ComfyUI"} if texts else {}


def _check_readable(file: Path, lora: LoRA, backbone: Backbone) -> None:
    """Raises UserError where diffusers reads another LoRA out of the file."""
    found, expected = read_user_lora(file, backbone).modules(), lora.modules()
    same = found.keys() == expected.keys() and all(
        torch.equal(found[name][half], pair[half].float()) for name, pair in expected.items() for half in (0, 1)
    )
    if not same:
        raise UserError(f"export.formats: diffusers reads another LoRA out of {file.name} than was written; leave its format out.")


def _write_network(folder: Path, backbone: Backbone, dtype: str) -> None:
    """The network as diffusers saves it, without the place that it was loaded from."""
    module = backbone.module
    if dtype != "float32":
        module = copy.deepcopy(module).to(getattr(torch, dtype))
    module.save_pretrained(folder, safe_serialization=True, max_shard_size="50GB")  # one file, which ComfyUI can read
    for file in folder.iterdir():
        share(file)
    file = folder / "config.json"
    config = {key: value for key, value in json.loads(file.read_text()).items() if key != "_name_or_path"}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _example(teacher: Teacher) -> tuple[Tensor, Tensor, Any]:
    """Inputs of two samples: the first prompts that come to mind, noise, and timesteps at both ends."""
    cond = teacher.encode_prompts(["a fox", "two red apples on a table"])
    noise = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    return noise, torch.tensor([teacher.process.last_timestep, 19]), cond


def publish(folder: Path, export: ExportConfig) -> None:
    """Upload an exported folder to the hub, where ``export.push_to_hub`` asks for it. Nothing otherwise.

    The repository is named after the model, such as ``owner/Hyper-SDXL-4steps-lora``.

    Raises:
        UserError: the hub cannot be reached, or refuses.
    """
    if export.push_to_hub is None:
        return
    from huggingface_hub import HfApi

    name = json.loads((folder / CONTRACT).read_text())["name"]
    repository, api = f"{export.push_to_hub}/{name}", HfApi()
    try:
        api.create_repo(repository, private=export.private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"{name} by hypersd-pipeline")
    except Exception as error:  # offline, no token, no right: huggingface_hub has a class for each, httpx some more
        raise UserError(
            f"export.push_to_hub: {repository} could not be written ({type(error).__name__}); check the network, the name and HF_TOKEN."
        ) from error
    log.info("Uploaded %s to %s.", folder, repository)
