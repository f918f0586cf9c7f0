"""Weights of published reward models: found, checked and read before anything is computed. Tensors only, no pickled code."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from hypersd_pipeline.config import Strict
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.files import find_weights
from hypersd_pipeline.models.tensors import Shapes, check_finite, check_shapes, read_shapes
from hypersd_pipeline.verdicts import remembered


class Weights(Strict):
    """A file of weights: a local one, or one of a Hugging Face repository.

    Attributes:
        path: a local file. It overrides ``repo``.
        repo, file, revision: a file of a hub repository. Kept in the hub's own cache.
        sha256: of the file. Checked where it is given.
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

    def find(self, key: str, beside: tuple[str, ...] = ()) -> Path:
        """The local file, found, fetched and checked. See `find_weights`. Raises UserError."""
        place = {"repo": self.repo, "file": self.file, "revision": self.revision, "sha256": self.sha256}
        return find_weights(key, self.path, **place, beside=beside)


def read_tensors(path: Path, *, lazily: bool = False) -> dict[str, Tensor]:
    """Names and tensors of a ``.safetensors`` file, or of a PyTorch file of tensors only (a ``state_dict`` inside is taken out).

    Args:
        lazily: leave the values of a PyTorch file on the disk until they are looked at.

    Raises:
        UserError: the file is damaged, or holds anything but tensors.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=(lazily and zipfile.is_zipfile(path)) or None)
    except Exception as error:  # safetensors and unpickling raise whatever they like
        raise UserError(f"{path}: cannot be read as tensors only ({type(error).__name__}); fetch the file again.") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"{path}: holds no table of tensors; give the published weights file.")
    return dict(content)


def check_weights(
    path: Path, options: Any, expected: Callable[[], Shapes], translate: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] = dict
) -> None:
    """Check names, shapes and values of a file of weights without loading it; a file that was good is not read again.

    Args:
        options: what ``expected`` depends on. expected: names and shapes of the network. translate: published names to the network's.

    Raises:
        UserError: the file is damaged, holds another network or a value that is NaN or infinite.
    """

    def check() -> bool:
        tensors = _read_lazily(path)
        found = translate(tensors)
        check_shapes(path, {name: tuple(tensor.shape) for name, tensor in found.items()}, expected(), "give the published file")
        check_finite(path, tensors.items())
        return True

    remembered("weights", [path], options, check)


def _read_lazily(path: Path) -> dict[str, Tensor]:
    """As `read_tensors`, with values that are read from the disk where they are looked at."""
    if path.suffix != ".safetensors":
        return read_tensors(path, lazily=True)
    read_shapes(path)
    return read_tensors(path)  # safetensors maps the file into memory


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Fill ``module`` with exactly these tensors.

    Raises:
        UserError: a name is missing, unexpected, or has another shape. The first ones are named.
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
