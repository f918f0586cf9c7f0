"""A function on several processes: this one starts them, hands its arguments over, and may take back what the first of them gives.

All of that goes through files in a folder that the machines share. Tensors, images and configurations stay what they are.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from PIL import Image
from pydantic import BaseModel
from safetensors.torch import load_file
from torch import Tensor

from hypersd_pipeline.data.rows import Manifest, read_manifest, write_manifest
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.files import write_tensors, write_text
from hypersd_pipeline.models.lora import LoRA
from hypersd_pipeline.training import distributed
from hypersd_pipeline.training.distributed import ComputeConfig

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

PREFIX = "ranks-"
CALL, FAULT, RESULT = "call.json", "fault.json", "result.json"


@dataclass(frozen=True)
class Place:
    """Where processes meet, a folder that all machines share, and how many of them there are to be."""

    folder: Path
    compute: ComputeConfig


def on_processes(function: Callable[P, R]) -> Callable[P, R]:
    """The function on the processes of its argument ``place``. With one, or without a place, it is called here, as it is.

    It divides its work by `distributed.mine` and collects it by `distributed.gathered`, so that the first process has all of it. What that
    one gives is handed back. Nothing is left in the place.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        arguments = dict(inspect.signature(function).bind(*args, **kwargs).arguments)
        place = arguments.pop("place", None)
        if place is None or distributed.ranks() > 1 or place.compute.nodes * place.compute.here == 1:
            return function(*args, **kwargs)
        with meeting_place(place.folder) as folder:
            if not run(function, arguments, place.compute, folder, hands_back=True):
                raise UserError(
                    f"{place.folder.name}: the processes of {function.__name__} ended before it did, and what they said is above; run the "
                    "same command again."
                )
            return read(json.loads((folder / RESULT).read_text(encoding="utf-8")))  # type: ignore[no-any-return]

    return call


@contextmanager
def meeting_place(parent: Path) -> Iterator[Path]:
    """A folder for one call below ``parent``, which is removed afterwards."""
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(
    function: Callable[..., Any], arguments: Mapping[str, Any], compute: ComputeConfig, folder: Path, *, hands_back: bool = False
) -> bool:
    """Call a function of a module in every process, and wait.

    Args:
        hands_back: the first process leaves in the folder what the function gives.

    Returns:
        Whether all processes ended well.

    Raises:
        UserError, TrainingStopped: what they raised.
    """
    handed = {name: written(value, folder / name) for name, value in arguments.items()}
    call = {"function": _name(function), "arguments": handed, "compute": written(compute, folder), "hands_back": hands_back}
    write_text(folder / CALL, json.dumps(call))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what earlier nodes have left
    ended_well = distributed.start(__name__, folder, compute)
    if (folder / FAULT).exists():
        fault = json.loads((folder / FAULT).read_text(encoding="utf-8"))
        raise _named(fault["kind"])(fault["sentence"])
    return bool(ended_well)


def join(checkpoints: Path, done: Callable[[], bool] = lambda: False) -> None:
    """Take part, with this machine's processes, in everything on several machines whose folder appears below ``checkpoints``.

    Args:
        checkpoints: the folder of all stages' checkpoints, which all machines share.
        done: asked in between whether to end.

    Raises:
        KeyboardInterrupt: a signal came, also one that ended processes, which have saved a checkpoint.
    """
    seen: set[Path] = set()
    while not done():
        for call in sorted(set(checkpoints.glob(f"*/{PREFIX}*/{CALL}")) - seen):
            seen.add(call)
            content = json.loads(call.read_text(encoding="utf-8"))
            compute = read(content["compute"])
            if compute.nodes > 1 and not (call.parent / FAULT).exists():
                log.info("%s: joining %s", call.parents[1].name, content["function"].rpartition(":")[2])
                if distributed.start(__name__, call.parent, compute) is None:
                    raise KeyboardInterrupt
        time.sleep(1.0)


def work(folder: Path) -> int:
    """What every process does: rebuild the arguments and call the function. Its exit code.

    A refusal is left in the folder. Processes that are started again after one end at once.
    """
    if (folder / FAULT).exists():
        return 0
    call = json.loads((folder / CALL).read_text(encoding="utf-8"))
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    compute = read(call["compute"])
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // compute.here))
    with distributed.joined(compute):
        if distributed.is_first():
            logging.getLogger("hypersd_pipeline").setLevel(logging.INFO)
        try:
            function = _named(call["function"])  # its module knows how its own kinds of arguments are handed over
            result = function(**{name: read(value) for name, value in call["arguments"].items()})
            if call["hands_back"] and distributed.is_first():
                write_text(folder / RESULT, json.dumps(written(result, folder / "result")))
        except Exception as error:
            stopped = _is_stop(error)
            if not (stopped or isinstance(error, UserError)):
                raise
            write_text(folder / FAULT, json.dumps({"kind": _name(type(error)), "sentence": str(error)}))
            return 0 if stopped else 1  # all ranks stop together, but one alone may find a file missing
    return 0


def _is_stop(error: Exception) -> bool:
    """Whether it is a `TrainingStopped`. Only a loop that was imported can have stopped."""
    loop = sys.modules.get("hypersd_pipeline.training.loop")
    return loop is not None and isinstance(error, loop.TrainingStopped)


_HANDED: dict[type, tuple[Callable[[Any, Path], Mapping[str, Any]], Callable[[Mapping[str, Any]], Any]]] = {}


def handed(kind: type, write: Callable[[Any, Path], Mapping[str, Any]], back: Callable[[Mapping[str, Any]], Any]) -> None:
    """Say how values of a class are handed over: as JSON, with what is larger in a file at the path, and back."""
    _HANDED[kind] = write, back


def written(value: Any, path: Path) -> Any:
    """A value as JSON. What is larger is written to ``path``, or to names that begin with it."""
    if type(value) in _HANDED:
        return {"handed": _name(type(value)), "as": _HANDED[type(value)][0](value, path)}
    match value:
        case None | bool() | int() | float() | str():
            return value
        case BaseModel():
            return {"config": _name(type(value)), "values": value.model_dump(mode="json")}
        case Path():
            return {"path": str(value)}
        case Tensor():
            write_tensors(path, {"value": value})
            return {"tensor": str(path)}
        case Image.Image():
            value.save(path, format="PNG")
            return {"image": str(path)}
        case _ if _is_frame(value):
            return {"columns": list(value.columns), "lines": value.to_dict("split")["data"]}
        case functools.partial(func=function, args=(), keywords=keywords):
            return {"call": _name(function), "keywords": _each(keywords, path)}
        case Mapping():
            return {"keys": list(value), "items": _each(dict(enumerate(value.values())), path)}
        case list() | tuple():
            return {"sequence": type(value).__name__, "items": _each(dict(enumerate(value)), path)}
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {"parts": _name(type(value)), "fields": _each({f.name: getattr(value, f.name) for f in dataclasses.fields(value)}, path)}
    raise TypeError(f"a {type(value).__name__} cannot be handed to other processes")


def _each(values: Mapping[Any, Any], path: Path) -> dict[str, Any]:
    return {str(name): written(value, path.with_name(f"{path.name}-{name}")) for name, value in values.items()}


def read(value: Any) -> Any:
    """What `written` was given."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case {"handed": name, "as": content}:
            return _HANDED[_named(name)][1](content)
        case {"config": name, "values": values}:
            return _named(name).model_validate(values)
        case {"path": path}:
            return Path(path)
        case {"tensor": path}:
            return load_file(path)["value"]
        case {"image": path}:
            with Image.open(path, formats=["PNG"]) as image:
                image.load()
                return image.copy()
        case {"columns": columns, "lines": lines}:
            import pandas as pd

            return pd.DataFrame(lines, columns=columns)
        case {"call": name, "keywords": keywords}:
            return functools.partial(_named(name), **{key: read(part) for key, part in keywords.items()})
        case {"keys": keys, "items": items}:
            return dict(zip(keys, map(read, items.values()), strict=True))
        case {"sequence": kind, "items": items}:
            return (tuple if kind == "tuple" else list)(map(read, items.values()))
        case {"parts": name, "fields": fields}:
            return _named(name)(**{key: read(part) for key, part in fields.items()})
    raise TypeError(f"nothing that was handed over: {value}")


def _is_frame(value: Any) -> bool:
    """Whether it is a table. Training needs no pandas, so only one that was imported can have made it."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(value, pandas.DataFrame)


def _name(value: Any) -> str:
    return f"{value.__module__}:{value.__qualname__}"


def _named(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


def _write_lora(value: LoRA, path: Path) -> dict[str, Any]:
    write_tensors(path, {**value.tensors, **{f"judge.{name}": tensor for name, tensor in value.judge.items()}})
    return {"file": str(path), "names": list(value.tensors), "metadata": value.metadata, "judge": list(value.judge)}


def _read_lora(content: Mapping[str, Any]) -> LoRA:
    tensors = load_file(content["file"])
    judge = {name: tensors[f"judge.{name}"] for name in content["judge"]}
    return LoRA({name: tensors[name] for name in content["names"]}, content["metadata"], judge)


def _write_manifest(value: Manifest, path: Path) -> dict[str, Any]:
    write_manifest(path, dataclasses.replace(value, root=value.root.absolute()))
    return {"folder": str(path)}


handed(LoRA, _write_lora, _read_lora)
handed(Manifest, _write_manifest, lambda content: read_manifest(Path(content["folder"])))


if __name__ == "__main__":
    from hypersd_pipeline.training import processes  # this module is another one here, with a table of its own

    sys.exit(processes.work(Path(sys.argv[1])))
