"""What lets other packages be imported: torchvision beside a CPU-only torch, and Kedro's plugins without warnings of their own code.

The compiled library of torchvision's CUDA build cannot load beside a CPU-only torch, and ``import torchvision`` (hence peft, open_clip,
torchmetrics) fails with "operator torchvision::nms does not exist". Transforms and models need no compiled operator, so their schemas are
declared instead.
Nothing happens where the compiled library loads, or until something imports torchvision.
"""

import contextlib
import ctypes
import importlib
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

_library = None  # a torch.library.Library lives as long as this reference


class _Finder:
    @classmethod
    def find_spec(cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(cls)  # once. The regular finders go on from here
            _declare_missing_operators()


def _declare_missing_operators() -> None:
    global _library
    spec = importlib.machinery.PathFinder.find_spec("torchvision")
    if spec is None or not spec.origin:
        return
    import torch  # its libraries must be loaded before torchvision's

    compiled = Path(spec.origin).with_name("_C.so")
    try:
        if compiled.exists():
            ctypes.CDLL(str(compiled))
            return
    except OSError:
        pass
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        _library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def install() -> None:
    """Register the import hook (idempotent)."""
    if "torchvision" not in sys.modules and _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)  # type: ignore[arg-type]


def prepare_command_line() -> None:
    """What Kedro calls before it imports plugins (entry point ``kedro.init``).

    MLflow warns of a class inside kedro-mlflow when it is defined. It is defined here, where nobody has to read that.
    """
    install()
    with warnings.catch_warnings(record=True), contextlib.suppress(ImportError):  # filters are no help: MLflow sets its own
        importlib.import_module("kedro_mlflow.mlflow")
