"""A recipe on several processes: this one starts them, passes their metrics on, and takes up the finished training.

What they need is written into a folder beside the stage's checkpoints. They rebuild it, call the recipe and leave its last checkpoint.
From that the recipe in this process makes its result, as after any finished training. So nothing else has to be handed back.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import logging
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from pydantic import BaseModel

from hypersd_pipeline.data.cache import LatentCache
from hypersd_pipeline.data.rows import Manifest, read_manifest, write_manifest
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.files import write_tensors, write_text
from hypersd_pipeline.models.lora import LoRA
from hypersd_pipeline.recipes.stage import Outputs, shared
from hypersd_pipeline.training import distributed
from hypersd_pipeline.training.checkpoints import CheckpointStore
from hypersd_pipeline.training.config import StageConfig
from hypersd_pipeline.training.distributed import ComputeConfig
from hypersd_pipeline.training.loop import MetricSink, TrainingStopped

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

PREFIX = "ranks-"
CALL, FAULT, METRICS = "call.json", "fault.json", "metrics.jsonl"


def on_ranks(recipe: Callable[P, R]) -> Callable[P, R]:
    """The recipe, on the processes that ``outputs.compute`` asks for. With one it is called in this process, as it is."""

    @functools.wraps(recipe)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        arguments = inspect.signature(recipe).bind(*args, **kwargs).arguments
        compute = arguments["outputs"].compute
        if compute is not None and distributed.ranks() == 1 and compute.nodes * compute.here > 1:
            _launch(recipe, arguments, compute)
        return recipe(*args, **kwargs)

    return call


def _launch(recipe: Callable[..., Any], arguments: Mapping[str, Any], compute: ComputeConfig) -> None:
    """Train on all processes.

    Raises:
        UserError, TrainingStopped: what they raised.
        KeyboardInterrupt: a signal came before the training could save a checkpoint.
    """
    for stage in (value for value in arguments.values() if isinstance(value, StageConfig)):
        shared(stage, compute.nodes * compute.here)
    outputs: Outputs = arguments["outputs"]
    outputs.checkpoints.path.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=outputs.checkpoints.path))
    try:
        written = {name: _written(value, folder / name) for name, value in arguments.items()}
        name = f"{recipe.__module__}:{recipe.__qualname__}"
        write_text(folder / CALL, json.dumps({"recipe": name, "arguments": written, "compute": _written(compute, folder)}))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what earlier nodes have left
        with _passed_on(folder / METRICS, outputs.metrics):
            ended_well = distributed.start(__name__, folder, compute)
        _raise_fault(folder)
        if not ended_well:
            raise TrainingStopped(
                f"{outputs.checkpoints.path.name}: the training processes ended before the training did; what they said is above. Run the "
                "same command to continue from the last checkpoint."
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def join(checkpoints: Path, done: Callable[[], bool] = lambda: False) -> None:
    """Take part, with this machine's processes, in every training on several machines whose folder appears below ``checkpoints``.

    Args:
        checkpoints: the folder of all stages' checkpoints, which all machines share.
        done: asked between trainings whether to end.
    """
    seen: set[Path] = set()
    while not done():
        for call in sorted(set(checkpoints.glob(f"*/{PREFIX}*/{CALL}")) - seen):
            seen.add(call)
            compute = _read(json.loads(call.read_text(encoding="utf-8"))["compute"])
            if compute.nodes > 1 and not (call.parent / FAULT).exists():
                log.info("%s: joining its training", call.parents[1].name)
                distributed.start(__name__, call.parent, compute)
        time.sleep(1.0)


def _raise_fault(folder: Path) -> None:
    if (folder / FAULT).exists():
        fault = json.loads((folder / FAULT).read_text(encoding="utf-8"))
        raise (TrainingStopped if fault["kind"] == "TrainingStopped" else UserError)(fault["sentence"])


@contextmanager
def _passed_on(path: Path, sink: MetricSink) -> Iterator[None]:
    """While inside, what the first rank appends to the file goes to ``sink``."""
    path.touch()
    done = threading.Event()

    def follow() -> None:
        with open(path, encoding="utf-8") as file:
            rest = ""
            while True:
                last = done.is_set()
                *lines, rest = (rest + file.read()).split("\n")
                for line in lines:
                    values, step = json.loads(line)
                    sink(values, step)
                if last:
                    return
                done.wait(0.2)

    thread = threading.Thread(target=follow, name="metrics of the ranks")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _written(value: Any, path: Path) -> Any:
    """A recipe's argument as JSON. What is larger is written to ``path``."""
    match value:
        case None:
            return None
        case BaseModel():
            return {"config": _name(value), "values": value.model_dump(mode="json")}
        case Path():
            return {"path": str(value)}
        case LatentCache():
            return {"latents": str(value.path), "key": value.key}
        case LoRA():
            write_tensors(path, value.tensors)
            return {"lora": str(path), "names": list(value.tensors), "metadata": value.metadata}
        case Manifest():
            write_manifest(path, dataclasses.replace(value, root=value.root.absolute()))
            return {"manifest": str(path)}
        case Outputs(checkpoints=store):
            return {"checkpoints": str(store.path), "keep": store.keep, "restart": store.restart, "metrics": str(path.with_name(METRICS))}
        case _ if dataclasses.is_dataclass(value):
            fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            return {"parts": _name(value), "fields": {name: _written(part, path.with_name(name)) for name, part in fields.items()}}
    raise TypeError(f"a recipe's {type(value).__name__} cannot be handed to other processes")


def _read(written: Any) -> Any:
    """What `_written` was given. The metrics of `Outputs` go to the file that `_passed_on` follows."""
    match written:
        case None:
            return None
        case {"config": name, "values": values}:
            return _named(name).model_validate(values)
        case {"path": path}:
            return Path(path)
        case {"latents": path, "key": key}:
            return LatentCache(path, {"key": key})
        case {"lora": path, "names": names, "metadata": metadata}:
            from safetensors.torch import load_file

            tensors = load_file(path)
            return LoRA({name: tensors[name] for name in names}, metadata)
        case {"manifest": path}:
            return read_manifest(Path(path))
        case {"checkpoints": path, "keep": keep, "restart": restart, "metrics": metrics}:
            return Outputs(CheckpointStore(path, keep, restart), _appended(Path(metrics)))
        case {"parts": name, "fields": fields}:
            return _named(name)(**{key: _read(part) for key, part in fields.items()})
    raise TypeError(f"no argument of a recipe: {written}")


def _name(value: Any) -> str:
    return f"{type(value).__module__}:{type(value).__qualname__}"


def _named(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


def _appended(path: Path) -> MetricSink:
    def sink(metrics: Mapping[str, Any], step: int) -> None:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps([{name: float(value) for name, value in metrics.items()}, int(step)]) + "\n")

    return sink


def work(folder: Path) -> int:
    """What every process does: rebuild the arguments and call the recipe. Its exit code.

    A refusal is left in the folder. Processes that are started again after one end at once.
    """
    if (folder / FAULT).exists():
        return 0
    call = json.loads((folder / CALL).read_text(encoding="utf-8"))
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with distributed.joined(_read(call["compute"])):
        if distributed.is_first():
            logging.getLogger("hypersd_pipeline").setLevel(logging.INFO)
        try:
            _named(call["recipe"])(**{name: _read(value) for name, value in call["arguments"].items()})
        except (UserError, TrainingStopped) as error:
            write_text(folder / FAULT, json.dumps({"kind": type(error).__name__, "sentence": str(error)}))
            return 0 if isinstance(error, TrainingStopped) else 1  # all ranks stop together, but one alone may find a file missing
    return 0


if __name__ == "__main__":
    sys.exit(work(Path(sys.argv[1])))
