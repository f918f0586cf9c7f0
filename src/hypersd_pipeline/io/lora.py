"""LoRA folders that diffusers loads as they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedro.io import AbstractDataset

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.files import replacing_folder, tensors_sha256, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from hypersd_pipeline.models.lora import LoRA

CHECKSUM = "weights_sha256"
"""In the metadata of the weights: the hash of all tensors."""

JUDGE = "discriminator.safetensors"
"""The head of the stage's discriminator, where the next stage starts from it."""

WEIGHTS, SCHEDULER, CARD = "pytorch_lora_weights.safetensors", "scheduler_config.json", "README.md"

_CARD = """---
library_name: diffusers
tags: [lora, hyper-sd, few-step]
---
# {name}

A LoRA for {sampled} sampling without classifier-free guidance, trained on `{teacher}`.
{contract}
```python
import hypersd_pipeline  # only beside a CPU-only torch with torchvision's CUDA build: lets diffusers import torchvision
from diffusers import {scheduler}, DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{teacher}")  # the model that this LoRA was trained on
pipeline.load_lora_weights("path/to/{name}")
pipeline.fuse_lora()
pipeline.scheduler = {scheduler}.from_pretrained("path/to/{name}")
image = pipeline("a prompt", {arguments}).images[0]
```
"""


def sampling_contract(metadata: dict[str, str]) -> dict[str, Any]:
    """The sampling contract of a LoRA's metadata: scheduler, scheduler_config, steps, timestep_spacing, eta, guidance_scale.

    Raises:
        UserError: the metadata holds none, or one that is not JSON.
    """
    try:
        contract = json.loads(metadata["sampling_contract"])
    except (KeyError, ValueError, RecursionError):
        contract = None
    if not isinstance(contract, dict):
        raise UserError("This LoRA has no readable 'sampling_contract' in its metadata; train it again with this project.")
    return contract


def model_card(name: str, metadata: dict[str, str]) -> str:
    """A README with how to sample from the LoRA: the contract's rows and a snippet for diffusers."""
    from hypersd_pipeline.models.contract import sampling_arguments

    contract = sampling_contract(metadata)
    rows = [f"| {key} | `{value}` |" for key, value in contract.items() if key != "scheduler_config"]
    teacher = metadata.get("teacher", "the teacher")
    return _CARD.format(
        name=name,
        sampled="one- to eight-step" if contract.get("timestep_spacing") == "tcd" else f"{contract.get('steps', 4)}-step",
        teacher="src/hypersd_pipeline/assets/teacher" if teacher == "shipped" else teacher,
        contract="\n".join(["", "| sampling | |", "|-|-|", *rows, ""]),
        scheduler=contract.get("scheduler", "DDIMScheduler"),
        arguments=sampling_arguments(contract),
    )


def read_lora(path: Path) -> LoRA:
    """The LoRA of a file, with finite values and a scale of 1.

    Raises:
        UserError: the file is missing or damaged, or is no such LoRA.
    """
    from safetensors import SafetensorError, safe_open

    from hypersd_pipeline.models.lora import LoRA

    try:
        with safe_open(path, framework="pt") as file:
            lora = LoRA({name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {}))
        recorded = lora.metadata.pop(CHECKSUM, None)
        if recorded is not None and recorded != tensors_sha256(lora.tensors):
            raise ValueError("its weights do not match their recorded hash")
        lora.check()
        return lora
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; run the stage that trains it, or restore it with `dvc checkout` or `dvc pull`.") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); restore it with `dvc checkout` or train its stage again.") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file. Raises UserError where it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); restore it with `dvc checkout` or train its stage again.") from error


class LoRADataset(AbstractDataset["LoRA", "LoRA"]):
    """A folder with ``pytorch_lora_weights.safetensors`` (metadata inside), ``scheduler_config.json`` and a model card.

    ``StableDiffusionPipeline.load_lora_weights(folder)`` and ``DDIMScheduler.from_pretrained(folder)`` read it. The folder is replaced as a
    whole, so that weights and contract always belong together.
    """

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self._filepath, self.metadata = Path(filepath), metadata

    def check(self, shapes: Mapping[str, tuple[int, ...]], num_train_timesteps: int) -> None:
        """Check the LoRA against the teacher that it is used with: its network's weights, and the timesteps of its schedule.

        Raises:
            UserError: naming the file.
        """
        from hypersd_pipeline.models.contract import Contract

        lora = read_lora(self._filepath / WEIGHTS)
        try:
            lora.check(shapes)
            Contract.of(lora).check(num_train_timesteps)
        except UserError as error:
            raise UserError(f"{self._filepath / WEIGHTS}: {error}") from error

    def load(self) -> LoRA:
        lora, judge = read_lora(self._filepath / WEIGHTS), self._filepath / JUDGE
        return replace(lora, judge=read_tensors(judge)) if judge.is_file() else lora

    def save(self, data: LoRA) -> None:
        contract = sampling_contract(data.metadata)
        scheduler = {"_class_name": contract["scheduler"], **contract["scheduler_config"]}
        with replacing_folder(self._filepath) as folder:
            tensors = {name: tensor.detach().cpu() for name, tensor in data.tensors.items()}
            metadata = {"format": "pt", **data.metadata, CHECKSUM: tensors_sha256(tensors)}
            write_tensors(folder / WEIGHTS, tensors, metadata)
            if data.judge:
                write_tensors(folder / JUDGE, {name: tensor.detach().cpu() for name, tensor in data.judge.items()}, {"format": "pt"})
            (folder / SCHEDULER).write_text(json.dumps(scheduler, indent=2) + "\n")
            (folder / CARD).write_text(model_card(self._filepath.name, data.metadata))

    def _exists(self) -> bool:
        return (self._filepath / WEIGHTS).exists()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._filepath)}


class LoRAsDataset(AbstractDataset[None, "Callable[[str], LoRA]"]):
    """Loads as a function: a name without ``lora_`` -> the `LoRA` in that folder of ``filepath``. For nodes whose parameters name LoRAs."""

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self._filepath, self.metadata = Path(filepath), metadata

    def load(self) -> Callable[[str], LoRA]:
        return lambda name: read_lora(self._filepath / f"lora_{name}" / WEIGHTS)

    def save(self, data: None) -> None:
        raise UserError("LoRAs by name are an input of a node and never its output: correct the wiring in pipeline.py.")

    def _exists(self) -> bool:
        return True

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._filepath)}
