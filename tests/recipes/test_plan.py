"""The plan counts what the real code takes, refuses what does not fit, and names the batch that does."""

import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny import write_teacher
from torch import nn

from hypersd_pipeline.data.config import DataConfig, FolderSource
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.public import build, count, default_dtype, description, public
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher
from hypersd_pipeline.recipes.distil import make_adapters
from hypersd_pipeline.recipes.plan import ask as ask_module
from hypersd_pipeline.recipes.plan.ask import require_room
from hypersd_pipeline.recipes.plan.dry import bytes_of, dry_run
from hypersd_pipeline.recipes.plan.hardware import PlanConfig
from hypersd_pipeline.recipes.plan.needs import Needs, form_of, needs_at, needs_of
from hypersd_pipeline.recipes.plan.report import GB, about_the_largest, caches_gb, largest_batch, make_plan, require_fit
from hypersd_pipeline.recipes.rehearsal.run import UNITS, measured
from hypersd_pipeline.training.config import StageConfig, changed
from hypersd_pipeline.training.distributed import ComputeConfig

GPU = {"memory_gib": 24, "bf16_tflops": 100, "fp32_tflops": 50, "dollars_an_hour": 2, "sources": ["a test"]}


def plan(memory_gib: float = 24, **values: object) -> PlanConfig:
    gpu = {**GPU, "memory_gib": memory_gib}
    return PlanConfig.model_validate({"profile": "small", "profiles": {"small": gpu}, "images": 100, **values})


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> TeacherConfig:
    return TeacherConfig(source=str(write_teacher(tmp_path_factory.mktemp("tiny"), "sd15")))


@pytest.fixture(scope="module")
def stage() -> StageConfig:
    term = {"segments": 4, "guidance": [2.0, 3.0]}
    lora = {"rank": 4, "target_modules": ["to_q", "conv1"]}
    loop = {"steps": 1000, "batch_size": 8, "accumulate": 2, "learning_rate": 1e-3}
    return StageConfig.model_validate({"terms": {"consistency": term}, "lora": lora, "loop": loop})


@pytest.fixture(scope="module")
def needs(teacher, stage) -> Needs:
    return needs_of("tscd_k4", stage, teacher, description(teacher))


def test_a_dry_run_counts_what_lives_and_what_died():
    with torch.no_grad(), dry_run() as meter:
        layer = nn.Linear(10, 20, bias=False)
        x = torch.empty(5, 10)
        assert meter.now == 4 * (200 + 50)
        y = layer(x).relu()
        assert meter.peak == 4 * (200 + 50 + 2 * 100) and meter.now == 4 * (200 + 50 + 100)
        assert meter.operations == 2 * 5 * 10 * 20
        layer.double()
        assert meter.now == 4 * (2 * 200 + 50 + 100) and bytes_of([y, y]) == 400
    assert nn.Linear(2, 2).double().weight.dtype == torch.float64  # outside everything is as before


def test_a_remembered_result_has_the_type_that_is_the_default_now():
    with dry_run():
        for dtype in (torch.bfloat16, torch.float32):
            with default_dtype(dtype):
                assert nn.Linear(3, 7).bias.dtype == dtype


def test_static_memory_and_checkpoint_are_those_of_the_real_objects(teacher, stage, needs):
    model = load_teacher(teacher, parts=("backbone",))
    adapters = make_adapters(model, stage)
    trained = sum(p.numel() for p in adapters.parameters("student"))
    parameters = sum(p.numel() for p in model.backbone.module.parameters())
    assert (needs.trained, needs.parameters, needs.batch) == (trained, parameters, 4)
    least = 4 * (parameters + 3 * trained)  # the gradient and two moments
    assert least <= needs.static <= 1.2 * least + 2**17
    assert 4 * 4 * trained <= needs.checkpoint <= 1.05 * 4 * 4 * trained + 2**14
    assert needs.activations > 0 and needs.operations > 4 * needs.forward > 0


def test_activations_grow_with_the_batch_and_the_largest_batch_fits(teacher, stage, needs):
    told = description(teacher)
    small, larger = (needs_of("tscd_k4", stage, teacher, told, batch) for batch in (2, 6))
    assert small.peak < needs.peak < larger.peak and small.static == pytest.approx(needs.static, rel=0.05)
    found = largest_batch(needs, small, larger.peak * 1.001)
    assert found == 6
    assert largest_batch(needs, small, small.static / 2) == 0


def test_a_plan_counts_a_pass_of_about_as_many_images_as_fit(teacher, stage, needs):
    told, usable = description(teacher), needs.static + 2.6 * needs.activations
    _, other = needs_at("tscd_k4", stage, teacher, told, then=partial(about_the_largest, usable=usable))
    assert needs.batch < other.batch <= largest_batch(needs, other, usable)
    assert about_the_largest(needs, needs.peak) == 5  # four are counted already
    assert about_the_largest(needs, needs.static / 2) == 1
    assert about_the_largest(replace(needs, static=0, peak=0), 10**12) == 4096


def test_a_training_that_does_not_fit_is_refused_before_it_starts(teacher, stage, monkeypatch):
    def ask(free: float, small: int = 0) -> None:
        monkeypatch.setattr(ask_module, "free_memory", lambda device: free)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        require_room(plan(), teacher, ComputeConfig(processes=1), 2, {"tscd_k4": stage}, small)

    ask(1e9)
    with pytest.raises(UserError, match=r"^tscd_k4.stage: needs 0\.8 GB with 4 images a pass, and .* has 0\.1 GB free; raise loop"):
        ask(1e8)
    ask(1e8, small=10**6)  # nothing is counted for a small network


def test_a_network_is_loaded_in_the_type_of_its_file_too(teacher, stage, needs):
    told = description(teacher)
    half = needs_of("tscd_k4", stage, changed(teacher, variant="fp16"), told)
    assert half.peak == needs.peak
    frozen = needs.parameters - 2 * needs.trained
    assert half.loading == 6 * frozen  # 4 bytes of float32, 2 of the file


def test_a_command_of_a_large_process_has_a_peak_of_its_own(tmp_path):
    large = b"1" * 300_000_000
    code, seconds, peak = measured([sys.executable, "-IS", "-c", "print('said'); raise SystemExit(3)"], tmp_path / "logs" / "part.log")
    assert (code, len(large)) == (3, 300_000_000) and 0 < seconds
    assert 2e6 < peak < 1e8
    assert (tmp_path / "logs" / "part.log").read_text() == "said\n"


def test_stages_that_differ_in_weights_need_the_same(stage):
    assert form_of("tscd_k4", stage) == form_of("tscd_k1", changed(stage, terms={"consistency": {"segments": 1, "weight": 0.5}}))
    assert form_of("tscd_k4", stage) != form_of("tscd_k4", changed(stage, lora={"rank": 8}))


def test_a_plan_has_hours_cost_and_disk_and_refuses_what_does_not_fit(tmp_path, teacher, stage, needs):
    data = DataConfig(source=FolderSource(kind="folder", root=str(tmp_path), splits={"train": {"share": [0.0, 1.0]}}))
    table, text = make_plan(plan(utilisation=0.5), teacher, data, 4, {"tscd_k4": stage})
    hours = 1000 * 2 * needs.operations / (50e12 * 0.5) / 3600
    line = table.iloc[0]
    assert line["hours"] == pytest.approx(hours, abs=0.01) and line["fits"] and line["largest_batch"] > 4
    assert "tscd_k4" in text and "Caches of 100 images" in text
    latents, texts = caches_gb(teacher, data, description(teacher), 100)
    assert latents == 100 * 2 * 4 * 8 * 8 * 4 / GB and texts == 100 * 77 * 32 * 4 / GB
    require_fit(plan(), table)
    tight = plan(memory_gib=0.002, reserved_gib=0.0)
    table, _ = make_plan(tight, teacher, data, 4, {"tscd_k4": stage})
    with pytest.raises(UserError, match=r"tscd_k4 needs .* a small has"):
        require_fit(tight, table)
    require_fit(plan(memory_gib=0.002, reserved_gib=0.0, refuse=False), table)


def test_an_unknown_profile_is_refused():
    with pytest.raises(ValueError, match="profile is large, and profiles has small"):
        plan(profile="large")


@pytest.mark.parametrize(("layout", "parameters"), [("sd15", 859_520_964), ("sdxl", 2_567_463_684)])
def test_the_public_networks_have_their_published_sizes(layout, parameters):
    assert count(public(layout)["networks"]["unet"]) == parameters


def test_a_teacher_of_an_unknown_architecture_is_refused():
    with pytest.raises(UserError, match=r"set teacher.layout to sd15 or sdxl"):
        description(TeacherConfig(source="someone/model"))


def test_a_folder_is_described_by_its_own_files(teacher):
    told = description(teacher)
    assert build(told["networks"]["unet"]).config.cross_attention_dim == 32


def test_a_rehearsal_has_each_part_after_what_it_needs():
    names = [unit.name for unit in UNITS]
    assert len(set(names)) == len(names)
    for number, unit in enumerate(UNITS):
        assert set(unit.after) <= set(names[:number]), unit.name
