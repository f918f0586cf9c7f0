"""What is written of a model, and all that its files and its card say of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated, Any, Literal

from pydantic import Field

from hypersd_pipeline.config import Strict
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.contract import Contract
from hypersd_pipeline.models.teacher import Dtype, Teacher

Format = Literal["diffusers", "kohya", "unet", "onnx"]
HubName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")]

ALL_STEPS = (1, 2, 4, 8)
"""What a model on TCDScheduler's grid is made for."""


class ExportConfig(Strict):
    """What `kedro run --pipelines export` writes of each model.

    Attributes:
        formats: ``diffusers`` is a LoRA folder, ``kohya`` a file for ComfyUI, A1111 and sd-scripts. ``unet`` is the network with the LoRA
            merged into it, and ``onnx`` the same for other runtimes.
        dtype: of the weights of all formats but ``onnx``, which is float32.
        license: the teacher's, as the hub names it. A LoRA stands under the licence of its base model.
        base_model: hub id of the teacher, where ``teacher.source`` is a local folder.
        family: in names of files, such as ``SDXL``. None for what the teacher's layout is called.
        author: for the metadata of the files.
        push_to_hub: the hub's user or organisation that gets a repository for each model. None uploads nothing.
        private: whether these repositories are private.
    """

    formats: Annotated[tuple[Format, ...], Field(min_length=1)] = ("diffusers", "kohya", "unet", "onnx")
    dtype: Dtype = "float32"
    license: str
    base_model: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")] | None = None
    family: HubName | None = None
    author: str | None = None
    push_to_hub: HubName | None = None
    private: bool = True


@dataclass(frozen=True)
class Release:
    """A model that is exported.

    Attributes:
        name: of its file and its repository, as the published ones are named: ``Hyper-SDXL-4steps-lora``.
        contract: how it is sampled (`Contract.to_json`, read). timesteps: number of steps -> its grid.
        base_model: hub id of the teacher, or None. small: the teacher is the one that ships with the package.
        layout: ``sd15`` or ``sdxl``. resolution: in pixels. lora: whether it is a LoRA.
        component, class_name: of the network (see `Backbone`).
        license, author: see `ExportConfig`. provenance: method and hashes, without paths.
    """

    name: str
    contract: Mapping[str, Any]
    timesteps: Mapping[int, list[int]]
    base_model: str | None
    small: bool
    layout: str
    resolution: int
    lora: bool
    component: str
    class_name: str
    license: str
    author: str | None
    provenance: Mapping[str, str]

    @property
    def base(self) -> str:
        """The teacher in words."""
        return self.base_model or ("the small teacher of hypersd-pipeline" if self.small else "a private model")

    @property
    def metadata(self) -> dict[str, str]:
        """What each file of weights carries: contract, timesteps and provenance."""
        return {
            "sampling_contract": json.dumps(self.contract, sort_keys=True),
            "sampling_timesteps": json.dumps(self.timesteps),
            **self.provenance,
        }


def release_of(config: ExportConfig, teacher: Teacher, contract_text: str | None, metadata: Mapping[str, str], lora: bool) -> Release:
    """Collect what the files say.

    Args:
        contract_text: of `Contract.to_json`. metadata: of the LoRA or the network.

    Raises:
        UserError: the contract cannot be read, or does not fit the teacher's schedule.
    """
    contract, total = Contract.read(contract_text), teacher.process.num_train_timesteps
    contract.check(total)
    steps = ALL_STEPS if contract.grid == "tcd" else (contract.steps,)
    small = teacher.config.source == "shipped"
    base_model = config.base_model or teacher.hub_id
    family = config.family or ("Small" if small else {"sd15": "SD15", "sdxl": "SDXL"}[teacher.layout])
    told = {key: metadata[key] for key in ("method", "teacher_unet_sha256", "data_rows", "segments") if key in metadata}
    return Release(
        name=_name(family, contract, lora),
        contract=json.loads(contract_text or ""),
        timesteps={n: contract.timesteps(n, total).tolist() for n in steps},
        base_model=base_model,
        small=small,
        layout=teacher.layout,
        resolution=teacher.resolution,
        lora=lora,
        component=teacher.backbone.component,
        class_name=teacher.backbone.class_name,
        license=config.license,
        author=config.author,
        provenance={**told, **({} if base_model is None else {"base_model": base_model})},
    )


def _name(family: str, contract: Contract, lora: bool) -> str:
    """``Hyper-SDXL-4steps-lora``, as the published files are named. Their 1-step LoRA is the unified one, so k = 1 has another name."""
    steps = f"{contract.steps}step" + ("s" if contract.steps > 1 else "")
    if not lora:
        return f"Hyper-{family}-{steps}-Unet"
    return f"Hyper-{family}-{steps}-lora" if contract.steps > 1 or contract.grid == "tcd" else f"Hyper-{family}-{steps}-tscd-lora"


def check_export(config: ExportConfig, hub_id: str | None) -> None:
    """Check what can be told before anything is loaded.

    Args:
        hub_id: of the teacher (`Teacher.hub_id`).

    Raises:
        UserError: a package is missing, or a card for the hub would not name its base model.
    """
    if config.push_to_hub is not None and (config.base_model or hub_id) is None:
        raise UserError("export.push_to_hub: the card needs the teacher's hub id, so set export.base_model.")
    packages = ("onnx", "onnxscript", "onnxruntime") if "onnx" in config.formats else ()
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise UserError(
            f"export.formats: onnx needs the package {missing[0]}; install it with pip install 'hypersd-pipeline[onnx]', or leave onnx out."
        )
