"""A recipe on several processes: this one starts them, passes their metrics on, and takes up the finished training.

They call the recipe and leave its last checkpoint. From that the recipe in this process makes its result, as after any finished training.
So nothing else has to be handed back.
"""

from __future__ import annotations

import functools
import inspect
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from hypersd_pipeline.data.cache import LatentCache
from hypersd_pipeline.recipes.stage import Outputs, shared
from hypersd_pipeline.training import distributed, processes
from hypersd_pipeline.training.checkpoints import CheckpointStore
from hypersd_pipeline.training.config import StageConfig
from hypersd_pipeline.training.distributed import ComputeConfig
from hypersd_pipeline.training.loop import MetricSink, TrainingStopped

P = ParamSpec("P")
R = TypeVar("R")

METRICS = "metrics.jsonl"


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
    with processes.meeting_place(outputs.checkpoints.path) as folder, _passed_on(folder / METRICS, outputs.metrics):
        ended_well = processes.run(recipe, arguments, compute, folder)
    if not ended_well:
        raise TrainingStopped(
            f"{outputs.checkpoints.path.name}: the training processes ended before the training did; what they said is above. Run the "
            "same command to continue from the last checkpoint."
        )


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


def _appended(path: Path) -> MetricSink:
    def sink(metrics: Mapping[str, Any], step: int) -> None:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps([{name: float(value) for name, value in metrics.items()}, int(step)]) + "\n")

    return sink


def _write_outputs(value: Outputs, path: Path) -> dict[str, Any]:
    store = value.checkpoints
    return {"checkpoints": str(store.path), "keep": store.keep, "restart": store.restart, "metrics": str(path.with_name(METRICS))}


def _read_outputs(content: Mapping[str, Any]) -> Outputs:
    """Its metrics go to the file that `_passed_on` follows."""
    store = CheckpointStore(Path(content["checkpoints"]), content["keep"], content["restart"])
    return Outputs(store, _appended(Path(content["metrics"])))


processes.handed(Outputs, _write_outputs, _read_outputs)
processes.handed(
    LatentCache,
    lambda value, path: {"folder": str(value.path), "key": value.key},
    lambda content: LatentCache(content["folder"], {"key": content["key"]}),
)
