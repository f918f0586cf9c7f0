"""The dedicated one-step network: a folder that diffusers loads, with its sampling contract and a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.files import file_sha256
from hypersd_pipeline.models.backbones import Backbone
from hypersd_pipeline.models.tensors import Shapes, check_finite, check_shapes, read_shapes

CONTRACT = "sampling_contract.json"

CHECKSUM = "weights_sha256"
"""In the contract's file: the sha256 of each file of weights."""

_CURE = "restore it with `dvc checkout` or train the one-step network again."

_CARD = """---
library_name: diffusers
tags: [hyper-sd, one-step]
---
# One-step UNet

A UNet for one-step sampling without classifier-free guidance, trained on `{teacher}`.

```python
import hypersd_pipeline  # only beside a CPU-only torch with torchvision's CUDA build: lets diffusers import torchvision
from diffusers import DiffusionPipeline, LCMScheduler, {class_name}

{component} = {class_name}.from_pretrained("path/to/this/folder")
pipeline = DiffusionPipeline.from_pretrained("{teacher}", {component}={component})  # the model that it was trained on
pipeline.scheduler = LCMScheduler.from_pretrained("path/to/this/folder")
image = pipeline("a prompt", num_inference_steps=1, timesteps=[{time}], guidance_scale=0).images[0]
```
"""


def write_network(folder: Path, network: Backbone, contract: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Write the network (safetensors), LCMScheduler's config, the contract with ``metadata``, and a model card.

    Args:
        contract: of `Contract.to_json`, read.
    """
    network.module.save_pretrained(folder, safe_serialization=True)
    scheduler = {"_class_name": contract["scheduler"], **contract["scheduler_config"]}
    (folder / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n")
    recorded = {CHECKSUM: _weights_sha256(folder)}
    (folder / CONTRACT).write_text(json.dumps({**contract, **metadata, **recorded}, indent=2) + "\n")
    teacher = metadata.get("teacher", "the teacher")
    source = "src/hypersd_pipeline/assets/teacher" if teacher == "shipped" else teacher
    card = _CARD.format(teacher=source, time=contract["timesteps"][0], class_name=network.class_name, component=network.component)
    (folder / "README.md").write_text(card)


def check_network(folder: Path, shapes: Shapes, num_train_timesteps: int) -> None:
    """Check a folder against the teacher whose network it is another one of.

    Args:
        shapes: names and shapes of the teacher's network. num_train_timesteps: of its schedule.

    Raises:
        UserError: the contract or the weights are missing, damaged or of another network.
    """
    told = read_contract(folder)["timesteps"][0]
    if not 0 < told < num_train_timesteps:
        raise UserError(
            f"{folder / CONTRACT}: has the timestep {told}, but the teacher's end at {num_train_timesteps - 1}; use the teacher that the "
            f"UNet was trained on."
        )
    files = sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no safetensors weights; {_CURE}")
    found = {name: shape for path in files for name, shape in read_shapes(path).items()}
    check_shapes(files[0], found, shapes, "use the teacher that the UNet was trained on")
    for path in files:
        check_finite(path)


def read_network(folder: Path, network: Backbone) -> Mapping[str, Any]:
    """Give ``network``, which has the same architecture, the folder's weights. Returns the contract with its metadata.

    Raises:
        UserError: the folder has no contract that can be read, or its weights are damaged.
    """
    contract = read_contract(folder)
    recorded = contract.get(CHECKSUM)
    if recorded is not None and recorded != _weights_sha256(folder):
        raise UserError(f"{folder} is damaged: its weights do not match their recorded hashes; {_CURE}")
    module = network.module
    try:
        tensors = type(module).from_pretrained(folder, use_safetensors=True).state_dict()
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} has no weights that can be read ({type(error).__name__}: {error}); {_CURE}") from error
    module.load_state_dict(tensors)
    return contract


def _weights_sha256(folder: Path) -> dict[str, str]:
    """Of each file of weights, which diffusers divides when the network is large."""
    return {path.name: file_sha256(path) for path in sorted(folder.glob("*.safetensors"))}


def read_contract(folder: Path) -> Mapping[str, Any]:
    """The contract of a folder, with its metadata.

    Raises:
        UserError: it is missing or cannot be read.
    """
    try:
        contract = json.loads((folder / CONTRACT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder / CONTRACT} cannot be read ({type(error).__name__}); train the one-step network again.") from error
    timesteps = contract.get("timesteps") if isinstance(contract, dict) else None
    if not isinstance(timesteps, list) or len(timesteps) != 1 or not isinstance(timesteps[0], int) or "data_rows" not in contract:
        raise UserError(f"{folder / CONTRACT}: is no contract of a one-step UNet; train it again.")
    return contract  # type: ignore[no-any-return]
