"""Weights of published reward models: found, checked and read before anything is computed. Tensors only, no pickled code."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from hypersd_pipeline.config import Strict
from hypersd_pipeline.errors import UserError


class Weights(Strict):
    """A file of weights: a local one, or one of a Hugging Face repository.

    Attributes:
        path: a local file; it goes before ``repo``.
        repo, file, revision: a file of a hub repository; kept in the hub's own cache.
        sha256: of the file; checked where it is given.
    """

    path: Path | None = None
    repo: str | None = None
    file: str | None = None
    revision: str | None = None
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")

    @model_validator(mode="after")
    def _somewhere(self) -> Weights:
        if self.path is None and not (self.repo and self.file):
            raise ValueError("give a local path, or repo and file of the hub")
        return self


def find_weights(weights: Weights, key: str, beside: tuple[str, ...] = ()) -> Path:
    """The local file of some weights, checked; a hub file is downloaded first.

    Args:
        key: the configuration key, for messages.
        beside: names of further files that must lie in the same folder or repository.

    Raises:
        UserError: the file, or one beside it, is missing or cannot be fetched, or has another sha256.
    """
    if weights.path is not None:
        path = weights.path.expanduser()
        for file in (path, *(path.with_name(name) for name in beside)):
            if not file.is_file():
                raise UserError(f"{key}: {file} does not exist; put the file there, or name its place in {key}.path or {key}.repo.")
    else:
        path = [_download(weights, name, key) for name in (*beside, weights.file or "")][-1]
    if weights.sha256 is not None:
        with open(path, "rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        if found != weights.sha256:
            raise UserError(f"{key}: {path} has sha256 {found}, not {weights.sha256}; fetch the file again or correct {key}.sha256.")
    return path


def _download(weights: Weights, file: str, key: str) -> Path:
    from huggingface_hub import hf_hub_download

    assert weights.repo is not None
    try:
        return Path(hf_hub_download(weights.repo, file, revision=weights.revision))
    except Exception as error:  # offline, private, misspelt: huggingface_hub has a class for each, httpx some more
        raise UserError(
            f"{key}: {file} of {weights.repo} could not be fetched from the hub ({type(error).__name__}); check the spelling, the network "
            f"and HF_TOKEN, or give a local file in {key}.path."
        ) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Names and tensors of a ``.safetensors`` file, or of a PyTorch file of tensors only (a ``state_dict`` inside is taken out).

    Raises:
        UserError: the file is damaged, or holds anything but tensors.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors and unpickling raise whatever they like
        raise UserError(f"{path}: cannot be read as tensors only ({type(error).__name__}); fetch the file again.") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"{path}: holds no table of tensors; give the published weights file.")
    return dict(content)


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Fill ``module`` with exactly these tensors.

    Raises:
        UserError: a name is missing, unexpected, or has another shape; the first ones are named.
    """
    own = module.state_dict()
    faults = [f"{name} is missing" for name in own if name not in tensors]
    faults += [f"{name} is unexpected" for name in tensors if name not in own]
    faults += [
        f"{name} has shape {list(v.shape)} and not {list(own[name].shape)}"
        for name, v in tensors.items()
        if name in own and v.shape != own[name].shape
    ]
    if faults:
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        raise UserError(f"{path}: not the weights of this architecture: {'; '.join(faults[:3])}{more}; give the published file.")
    module.load_state_dict(dict(tensors))
