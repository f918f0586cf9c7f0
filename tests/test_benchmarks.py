"""The cost benchmark: what each step runs through the UNet, by counting, and the report of a whole run. Nothing is timed here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
TINY = ["--preset", "tiny", "--device", "cpu"]

# passes at the training batch: whole UNet forward, backward, encoder and mid block alone forward, backward
PASSES = {
    "tscd_base": (2 + 1 + 1, 1, 0, 0),  # both halves of the guidance in one call, target, student
    "tscd_previous": (1 + 1 + 1, 1, 0, 0),
    "tscd_base_adversarial": (4, 1, 2, 1),  # target and prediction. Only the prediction sends a gradient back
    "tscd_previous_adversarial": (3, 1, 3, 1),  # and the input, which has not been through the base model
    "lcm": (4, 1, 0, 0),  # student, teacher twice, target
    "lcm_cached": (4, 1, 0, 0),
    "lcm_two_unets": (4, 1, 0, 0),
}


def start(*options):
    command = [sys.executable, str(BENCHMARKS / "step_cost.py"), *TINY, *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT / "src")})


@pytest.fixture
def step_cost(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import step_cost

    return step_cost


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A whole run, as a user starts it."""
    output = tmp_path_factory.mktemp("benchmark") / "new" / "cost"
    done = start("--rounds", "2", "--warmup", "0", "--output", str(output))
    assert done.returncode == 0, done.stderr
    written = output.with_suffix(".md").read_text()
    assert written.strip() in done.stdout
    return json.loads(output.with_suffix(".json").read_text()), written


def counted(row):
    return tuple(row[f"{part}_{direction}s"] for part in ("unet", "encoder") for direction in ("forward", "backward"))


@pytest.mark.parametrize("name", PASSES)
def test_each_step_runs_the_passes_it_is_charged_for(step_cost, name):
    row = step_cost.measure_alone(step_cost.parse([*TINY, "--alone", name]))
    assert counted(row) == PASSES[name]


@pytest.mark.parametrize("name", ["tscd_base_adversarial", "lcm"])
def test_sdxl_layout_runs_the_same_passes(step_cost, name):
    row = step_cost.measure_alone(step_cost.parse(["--preset", "tiny-sdxl", "--device", "cpu", "--alone", name]))
    assert counted(row) == PASSES[name]


@pytest.mark.parametrize("name", ["tscd_base_adversarial", "lcm"])
def test_bfloat16_and_checkpointing_run_the_same_passes(step_cost, name):
    options = ["--dtype", "bfloat16", "--gradient-checkpointing", "--batch", "3", "--alone", name]
    assert counted(step_cost.measure_alone(step_cost.parse([*TINY, *options]))) == PASSES[name]


def test_checkpointing_costs_one_more_forward(step_cost):
    rows = [
        step_cost.measure_alone(step_cost.parse([*TINY, *more, "--alone", "lcm_cached"])) for more in ([], ["--gradient-checkpointing"])
    ]
    plain, again = (row["operations_in_forwards"] for row in rows)
    assert 0.7 < again - plain < 1.2  # what lies between the first and the last convolution


@pytest.mark.slow  # a process for each variant, each of which imports everything
def test_report_of_a_whole_run(report):
    found, written = report
    rows = {row["name"]: row for row in found["rows"]}
    assert set(rows) == set(PASSES)
    share = found["encoder_share"]
    for name, row in rows.items():
        unet_forward, unet_backward, encoder_forward, encoder_backward = PASSES[name]
        assert counted(row) == PASSES[name]
        assert row["ideal_forwards"] == pytest.approx(unet_forward + unet_backward + share * (encoder_forward + encoder_backward))
        assert row["forwards"] == pytest.approx(row["milliseconds"] / 1e3 / found["forward_seconds"])
        assert row["over_ideal"] == pytest.approx(row["forwards"] / row["ideal_forwards"])
        assert row["over_lcm"] == pytest.approx(row["milliseconds"] / rows["lcm"]["milliseconds"])
        assert row["peak_memory_mb"] > 0
        assert row["title"] in written
        assert len(found["round_seconds"][name]) == 2


@pytest.mark.slow
def test_resident_unets_and_operations(report):
    rows = {row["name"]: row for row in report[0]["rows"]}
    assert {name: rows[name]["resident_unets"] for name in ("tscd_base", "tscd_previous", "lcm", "lcm_cached", "lcm_two_unets")} == {
        "tscd_base": 1.0,
        "tscd_previous": 1.0,
        "lcm": 1.0,
        "lcm_cached": 1.0,
        "lcm_two_unets": 2.0,
    }
    operations = {name: row["operations_in_forwards"] for name, row in rows.items()}
    assert operations["lcm_cached"] == operations["tscd_base"]  # the same passes, batched or not
    assert operations["lcm"] > operations["lcm_cached"]  # VAE and text encoders
    assert operations["tscd_previous"] < operations["tscd_base"] < operations["tscd_base_adversarial"]


@pytest.mark.slow
def test_parts_add_up_to_the_step(report):
    found = report[0]
    step = next(row for row in found["rows"] if row["name"] == "tscd_base")
    for column in ("forwards", "operations_in_forwards", "ideal_forwards"):
        assert sum(part[column] for part in found["parts"]) == pytest.approx(step[column])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "0"], "--batch is 0; give 1 or more"),
        (["--resolution", "30"], "--resolution 30 is no multiple of 8"),
        (["--preset", "shipped", "--resolution", "128"], "the packaged teacher has 64 pixels"),
    ],
)
def test_impossible_options_are_refused(step_cost, options, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["step_cost.py", *TINY, *options, "--alone", "lcm"])
    with pytest.raises(SystemExit) as stopped:
        step_cost.main()
    assert stopped.value.code not in (0, None)
    assert message in str(stopped.value.code) + capsys.readouterr().err


@pytest.mark.slow
def test_one_step_stages_hold_one_unet_and_two():
    command = [sys.executable, str(BENCHMARKS / "one_step_cost.py"), *TINY, "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT / "src")})
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    assert [row[-1] for row in rows] == ["1.00", "1.00", "2.00", "2.00", "2.00"]
    assert [row[1] for row in rows] == ["7.0", "9.0", "8.0", "8.0", "10.0"]


@pytest.fixture
def update_speed(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import update_speed

    return update_speed


def test_each_kind_of_update_is_measured_beside_lcms(update_speed):
    """At toy sizes on the CPU: all rows run, in the dtype and layout that a GPU has, and the table divides by LCM's."""
    options = [*TINY, "--rounds", "1", "--warmup", "0", "--channels-last", "--peak-tflops", "0.1"]
    rows = {name: update_speed.measure_alone(update_speed.parse([*options, "--alone", name])) for name in update_speed.ROWS}
    assert all(row["seconds"] > 0 and row["operations"] > 1e6 for row in rows.values())
    assert rows["hybrid"]["operations"] > rows["tscd"]["operations"] and rows["dmd"]["operations"] > rows["tscd"]["operations"]
    rows["lcm"] |= {"seconds": 0.5, "operations": 2e10, "peak_memory_mb": 100.0}
    rows["tscd"] |= {"seconds": 0.25, "operations": 1e10, "peak_memory_mb": 80.0}
    lines = update_speed.table(update_speed.parse(options), rows).splitlines()
    assert lines[0] == "`tiny`, batch 2, 32 px, bfloat16, cpu; median of 1 updates, channels last."
    assert lines[4] == "| LCM-LoRA | 500 | 4.00 | 1.00 | 0.04 | 0.400 | 100 | 1.00 |"
    assert lines[5] == "| TSCD | 250 | 8.00 | 0.50 | 0.04 | 0.400 | 80 | 0.80 |"


def test_the_peak_is_that_of_the_device(update_speed):
    args = update_speed.parse(["--preset", "sdxl"])
    assert update_speed.peak_of(args, "NVIDIA H100 80GB HBM3") == 989e12 and update_speed.peak_of(args, "a new one") is None
    assert update_speed.peak_of(update_speed.parse(["--dtype", "float32"]), "NVIDIA H100 80GB HBM3") is None
