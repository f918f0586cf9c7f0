"""Recipes on processes that torchrun starts: one dies, one is told to end, and the weights are those of an undisturbed training."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from itertools import pairwise

import psutil
import pytest
import stages
import tiny
import torch
from pydantic import ValidationError
from ranks import on_ranks
from worlds import prepare

from hypersd_pipeline.checks import check_processes
from hypersd_pipeline.data.config import DataConfig
from hypersd_pipeline.data.rows import Manifest, Row
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.metrics.config import EvaluationConfig
from hypersd_pipeline.models.lora import LoRA, lora_key
from hypersd_pipeline.models.teacher import TeacherConfig
from hypersd_pipeline.recipes import launch
from hypersd_pipeline.recipes.distil import distil
from hypersd_pipeline.recipes.feedback import AnnotatedData
from hypersd_pipeline.recipes.stage import Outputs
from hypersd_pipeline.training import processes
from hypersd_pipeline.training.checkpoints import CheckpointStore
from hypersd_pipeline.training.config import FeedbackConfig, OneStepConfig, StageConfig
from hypersd_pipeline.training.distributed import ComputeConfig
from hypersd_pipeline.training.loop import TrainingStopped

STAGE = StageConfig(
    terms={"consistency": {"segments": 4, "guidance": (3.0, 5.0)}},
    lora={"rank": 2, "target_modules": ("to_q", "to_v", "conv1")},
    loop={"steps": 60, "batch_size": 4, "learning_rate": 0.01, "log_every": 1, "checkpoint_every": 10},
)
JOIN = """
import sys
from pathlib import Path
from hypersd_pipeline.training.processes import join
folder = Path(sys.argv[1])
join(folder, lambda: any((folder / "disturbed").glob("*/step-*")) and not any(folder.glob("disturbed/ranks-*")))
"""
TWO = ComputeConfig(processes=2, max_restarts=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage")
    teacher = TeacherConfig(source=str(tiny.write_sd15(folder)))
    return teacher, prepare(folder, teacher)


def test_a_killed_rank_and_an_interruption_leave_the_weights_of_an_undisturbed_training(made, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of all processes, as in the forked ones: bits depend on it
    teacher, latents = made
    start = LoRA(dict(reversed(first_lora(made, tmp_path / "first").tensors.items())), {"a": "b"})

    def train(folder, sink=lambda values, step: None, compute=None):
        return distil(latents, teacher, STAGE, Outputs(CheckpointStore(tmp_path / folder), sink, compute), start)

    def others():
        return sorted(child.pid for child in psutil.Process().children() if processes.__name__ in child.cmdline())

    groups, steps = [], []

    def disturb(at, number):
        def sink(values, step):
            steps.append(step)
            if step >= at and (not groups or (number == signal.SIGKILL and len(groups) == 1)):
                groups.append(others())
                os.kill(groups[-1][-1], number)

        return sink

    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = f"localhost:{free.getsockname()[1]}"
    machines = ComputeConfig(processes=1, nodes=2, rendezvous=place)
    other = subprocess.Popen([sys.executable, "-c", JOIN, str(tmp_path)])  # the other machine, with a process of its own
    with pytest.raises(TrainingStopped, match=r"k4: interrupted after step \d+; run the same command to continue"):
        train("disturbed", disturb(15, signal.SIGTERM), machines)
    assert other.wait(60) == 0
    last = steps[-1]
    assert steps == list(range(1, last + 1)) and 15 <= last < 60 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    steps.clear()
    lora, report = train("disturbed", disturb(last + 5, signal.SIGKILL), TWO)
    assert [len(group) for group in groups] == [1, 2] and steps[0] == last + 1 and steps[-1] == 60
    assert any(later <= earlier for earlier, later in pairwise(steps))  # the group went back to its last checkpoint
    assert not list((tmp_path / "disturbed").glob("ranks-*")) and report["mean_step_seconds"] > 0
    whole = on_ranks(2, tmp_path / "group", lambda: train("whole")[0].tensors)[0]
    assert all(torch.equal(lora.tensors[name], whole[name]) for name in whole)


def test_arguments_of_every_recipe_reach_the_other_processes(made, tmp_path):
    """As equal values, but for the metrics, which go to a file."""
    teacher, latents = made
    values = stages.parameters()
    data = DataConfig.model_validate(values["data"])
    row = Row("a", "images/a.png", ("a cat",), 64, 64, 1, "0" * 64)
    lora = LoRA({"unet.b.lora_A.weight": torch.ones(2, 3), "unet.a.lora_A.weight": torch.zeros(2, 3)}, {"a": "b"})
    lora = dataclasses.replace(lora, judge={"layers.0.bias": torch.ones(3)})
    given = {
        "source": AnnotatedData(Manifest(tmp_path / "dataset", {"train": (row,)}), data, latents),
        "teacher": teacher,
        "evaluation": EvaluationConfig.model_validate(values["evaluation"]),
        "lora": lora,
        "stage": FeedbackConfig.model_validate(values["feedback"]["stage"]),
        "unified": OneStepConfig.model_validate(values["dmd"]["stage"]),
        "pairs": tmp_path / "pairs",
        "start": None,
        "outputs": Outputs(CheckpointStore(tmp_path / "stage", keep=3, restart=True), print, TWO),
    }
    (tmp_path / "call").mkdir()
    written = json.loads(json.dumps({name: processes.written(value, tmp_path / "call" / name) for name, value in given.items()}))
    found = {name: processes.read(value) for name, value in written.items()}
    for name in ("teacher", "evaluation", "stage", "unified", "pairs", "start"):
        assert found[name] == given[name] and type(found[name]) is type(given[name])
    source, back = given["source"], found["source"]
    assert (back.manifest, back.data, back.latents.key) == (source.manifest, source.data, source.latents.key)
    assert list(found["lora"].tensors) == list(lora.tensors) and lora_key(found["lora"]) == lora_key(lora)
    assert found["lora"].metadata == lora.metadata and found["lora"].judge["layers.0.bias"].tolist() == [1.0] * 3
    store = found["outputs"].checkpoints
    assert (store.path, store.keep, store.restart, found["outputs"].compute) == (tmp_path / "stage", 3, True, None)
    seen = []
    with launch._passed_on(tmp_path / "call" / launch.METRICS, lambda values, step: seen.append((values, step))):
        found["outputs"].metrics({"loss": 0.1}, 7)
    assert seen == [({"loss": 0.1}, 7)]


def test_refusals_of_the_number_of_processes(made, tmp_path):
    with pytest.raises(ValidationError, match="set rendezvous to host:port of one of them"):
        ComputeConfig(processes=1, nodes=2)
    with pytest.raises(UserError, match="4 samples of a pass cannot be shared by 3 processes; use a multiple of 3"):
        distil(made[1], made[0], STAGE, Outputs(CheckpointStore(tmp_path), print, ComputeConfig(processes=3)))
    with pytest.raises(UserError, match=r"WORLD_SIZE is 2: .* without torchrun or accelerate launch, and set compute.processes"):
        check_processes({"WORLD_SIZE": "2"})
    check_processes({"WORLD_SIZE": "1"})


def first_lora(made, folder):
    """What a stage starts from."""
    loop = {**STAGE.loop.model_dump(), "steps": 1}
    return distil(
        made[1],
        made[0],
        STAGE.model_copy(update={"loop": type(STAGE.loop)(**loop)}),
        Outputs(CheckpointStore(folder), lambda values, step: None),
    )[0]
