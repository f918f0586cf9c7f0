"""Runs every part of the job in a process of its own, and measures its time and its peak memory."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hypersd_pipeline.recipes.plan.room import free_memory
from hypersd_pipeline.recipes.rehearsal.world import World

log = logging.getLogger(__name__)

GB = 1e9
PASSED, FAILED, NOT_REACHED, LEFT_OUT = "passed", "failed", "not reached", "left out"


@dataclass(frozen=True)
class Unit:
    """Nodes that run in one process.

    Attributes:
        pipeline: that has the nodes. nodes: none means all of them. after: names of units whose results it needs.
    """

    name: str
    pipeline: str
    nodes: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How a unit ended. seconds: on the clock. peak: of its resident memory, in bytes. note: why it did not pass."""

    unit: Unit
    result: str
    seconds: float = 0.0
    peak: float = 0.0
    note: str = ""


def _distilled(k: str, before: tuple[str, ...]) -> tuple[Unit, Unit]:
    train = Unit(f"tscd_{k}.train", "tscd", (f"tscd_{k}.train",), ("data_prep", *before))
    return train, Unit(f"tscd_{k}.evaluate", "tscd", (f"tscd_{k}.evaluate",), (train.name, "prepare_reference"))


def _one_step(stage: str) -> tuple[Unit, ...]:
    start = f"{stage}.start"  # passed on in memory, so it is made again in each process
    pairs = Unit(f"{stage}.pairs", stage, (start, f"{stage}.pairs"), ("tscd_k1.train", "feedback.train"))
    train = Unit(f"{stage}.train", stage, (start, f"{stage}.train"), (pairs.name,))
    return pairs, train, Unit(f"{stage}.evaluate", stage, (f"{stage}.evaluate",), (train.name, "prepare_reference"))


def _exported(model: str, stage: str) -> Unit:
    return Unit(f"export_{model}", "export", (f"export_{model}", f"publish_{model}"), (f"{stage}.evaluate",))


_MODELS = {"k8": "tscd_k8", "k4": "tscd_k4", "k2": "tscd_k2", "k1": "tscd_k1", "unified": "dmd", "unet": "one_step_unet"}
UNITS: tuple[Unit, ...] = (
    Unit("data_prep", "data_prep"),
    Unit("prepare_reference", "evaluation", ("prepare_reference",), ("data_prep",)),
    *_distilled("k8", ()),
    *_distilled("k4", ("tscd_k8.train",)),
    *_distilled("k2", ("tscd_k4.train",)),
    *_distilled("k1", ("tscd_k2.train",)),
    Unit("feedback.train", "feedback", ("feedback.train",), ("tscd_k1.train",)),
    Unit("feedback.measure", "feedback", ("feedback.merge", "feedback.measure"), ("feedback.train", "prepare_reference")),
    *_one_step("dmd"),
    *_one_step("one_step_unet"),
    Unit("evaluate_teacher", "evaluation", ("evaluate_teacher",), ("prepare_reference",)),
    Unit(
        "summarise", "evaluation", ("summarise",),
        ("evaluate_teacher", *(f"{stage}.evaluate" for stage in _MODELS.values()), "feedback.measure"),
    ),
    *(_exported(model, stage) for model, stage in _MODELS.items()),
)  # fmt: skip
"""All nodes of the main job and of the export, in the order in which they run."""


@dataclass
class Rehearsal:
    """Runs units of a world.

    Attributes:
        world: see `make_world`. planned: unit -> bytes that it takes by the plan. Where fewer are free when its turn comes, it is left out.
        outcomes: of what was run or left out so far.
    """

    world: World
    planned: Mapping[str, float] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)

    def run(self, units: Sequence[Unit] = UNITS) -> list[Outcome]:
        """Run them one after another. What needs the result of one that did not pass is not reached."""
        for number, unit in enumerate(units):
            outcome = self._run(unit)
            self.outcomes.append(outcome)
            told = f" ({outcome.note})" if outcome.note else ""
            log.info(
                "Rehearsal %d/%d, %s: %s%s, %.0f s, %.1f GB",
                number + 1, len(units), unit.name, outcome.result, told, outcome.seconds, outcome.peak / GB,
            )  # fmt: skip
        return self.outcomes

    def _run(self, unit: Unit) -> Outcome:
        bad = [outcome.unit.name for outcome in self.outcomes if outcome.result != PASSED and outcome.unit.name in unit.after]
        if bad:
            return Outcome(unit, NOT_REACHED, note=f"needs {bad[0]}")
        need, free = self.planned.get(unit.name, 0.0), free_memory()
        if need > free:
            note = f"needs {need / GB:.1f} GB of memory by the plan, and {free / GB:.1f} GB are free"
            return Outcome(unit, LEFT_OUT, note=note)
        command = [sys.executable, "-m", "kedro", "run", "--env", self.world.name, "--conf-source", str(self.world.conf)]
        command += ["--pipelines", unit.pipeline, *(["--nodes", ",".join(unit.nodes)] if unit.nodes else [])]
        logs = self.world.folder / "logs" / f"{unit.name}.log"
        code, seconds, peak = measured(command, logs)
        if code == 0:  # what the part needed to go on: gigabytes for each stage of a large teacher
            shutil.rmtree(self.world.folder / "06_models" / "checkpoints", ignore_errors=True)
        return Outcome(unit, PASSED if code == 0 else FAILED, seconds, peak, "" if code == 0 else fault(logs, code))


def measured(command: Sequence[str], logs: Path) -> tuple[int, float, float]:
    """Run a command with its output in a file: exit code, seconds and the peak of its resident memory in bytes.

    The peak is the kernel's own count of the process and of those that it waited for, whichever has the highest.
    """
    logs.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    launcher = [sys.executable, "-IS", str(Path(__file__).with_name("measure.py")), str(logs), *command]
    with subprocess.Popen(launcher, stdout=subprocess.PIPE, env={**os.environ, "HYPERSD_TRACKING": "offline"}) as process:
        try:
            said, _ = process.communicate()
        except BaseException:
            process.terminate()
            raise
    if process.returncode:  # it was ended itself
        return process.returncode, time.perf_counter() - began, 0.0
    found = json.loads(said)
    return found["code"], time.perf_counter() - began, float(found["peak"])


def fault(logs: Path, code: int) -> str:
    """The sentence of an error, from the log of what failed: what the command line said, or the end of a traceback."""
    if code < 0:
        return f"ended by signal {-code}" + (", as the kernel does where memory is short" if code == -9 else "")
    lines = [line for line in re.sub(r"\x1b\[[0-9;]*m", "", logs.read_text(errors="replace")).splitlines() if line.strip()]
    said = next((line.removeprefix("Error: ") for line in reversed(lines) if line.startswith("Error: ")), lines[-1] if lines else "")
    return f"{said.strip()[:300]} (see {logs})"


def baseline(folder: Path) -> float:
    """The peak of a process that only imports what a stage imports, in bytes."""
    code = (
        "import hypersd_pipeline.recipes.one_step, hypersd_pipeline.recipes.feedback, hypersd_pipeline.hooks, peft;"
        "import diffusers.models.unets.unet_2d_condition; from diffusers import AutoencoderKL;"
        "from transformers import CLIPTextModel, BlipVisionModel;"
        "import open_clip, hypersd_pipeline.perception.mmdet_nets"
    )
    return measured([sys.executable, "-c", code], folder / "logs" / "baseline.log")[2]


def clear(world: World) -> None:
    """Remove the random weights and all that was made with them, but for the logs and the environment."""
    for name in ("01_raw", "03_primary", "05_model_input", "06_models", "07_model_output"):
        shutil.rmtree(world.folder / name, ignore_errors=True)
