"""The main job with the smoke environment, on the real command line, and what DVC makes of it."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DDIMScheduler, StableDiffusionPipeline, TCDScheduler
from mlflow import MlflowClient
from PIL import Image
from recorded import changed, disagreements
from servers import environment_of

ROOT = Path(__file__).parents[1]
Run = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git checkout of the project of its own, without data."""
    folder = tmp_path_factory.mktemp("project")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("needs a git checkout")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "start"]):
        subprocess.run([*git, *command], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def run(project: Path) -> Run:
    """``run("kedro", ...)``, ``run("dvc", ...)`` in the project. Its own sources are the ones that run."""
    scripts = project / ".scripts"
    scripts.mkdir()
    for name in ("kedro", "dvc"):
        (scripts / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {name} "$@"\n')
        (scripts / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "KEDRO_", "DVC_"))}
    env = {**kept, "PYTHONPATH": str(project / "src"), "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "DO_NOT_TRACK": "1"}

    def call(*command: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return done

    return call


@pytest.fixture(scope="module")
def smoke(project: Path, run: Run) -> Path:
    """The project after ``kedro run --env smoke``."""
    run("kedro", "run", "--env", "smoke")
    return project


def test_the_run_leaves_loras_grids_and_results(smoke):
    for name in ("k8", "k4", "k2", "k1", "feedback", "unified"):
        assert {path.name for path in (smoke / "data/smoke/06_models" / f"lora_{name}").iterdir()} == {
            "pytorch_lora_weights.safetensors",
            "scheduler_config.json",
            "README.md",
        }
    with Image.open(smoke / "data/smoke/08_reporting/results_grid.png") as grid:
        assert grid.width > 6 * 32
    table = (smoke / "data/smoke/08_reporting/results.md").read_text()
    rows = [("teacher", 1), ("k1", 1), ("feedback", 4), *(("unified", n) for n in (1, 2, 4, 8)), ("unet", 1)]
    assert all(f"|{model}|{steps}|" in table for model, steps in rows)
    assert (smoke / "data/smoke/06_models/lora_with_feedback/w_1.00").is_dir()
    assert (smoke / "data/smoke/08_reporting/plot_feedback.png").exists()


def test_diffusers_samples_from_a_lora_as_its_card_says(smoke):
    from hypersd_pipeline.models.teacher import SHIPPED

    pipeline = StableDiffusionPipeline.from_pretrained(SHIPPED, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    folder = smoke / "data/smoke/06_models/lora_k4"

    def sample() -> Any:
        generator = torch.Generator().manual_seed(0)
        return pipeline("a red apple", num_inference_steps=4, guidance_scale=0, generator=generator, output_type="pt").images

    pipeline.scheduler = DDIMScheduler.from_pretrained(folder)
    before = sample()
    pipeline.load_lora_weights(str(folder))
    after = sample()
    assert torch.isfinite(after).all() and not torch.equal(before, after)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_diffusers_draws_with_the_unified_lora_what_we_measure(smoke, steps):
    from hypersd_pipeline.evaluation.sampling import generate, prompt_noise
    from hypersd_pipeline.io import LoRADataset
    from hypersd_pipeline.models.contract import Contract
    from hypersd_pipeline.models.lora import merge_lora
    from hypersd_pipeline.models.teacher import SHIPPED, TeacherConfig, load_teacher

    folder, prompts = (
        smoke / "data/smoke/06_models/lora_unified",
        ["a red apple on the left, blue background", "a cat in the centre, green background"],
    )
    teacher, lora = load_teacher(TeacherConfig(source="shipped")), LoRADataset(filepath=str(folder)).load()
    contract, noise = Contract.of(lora), prompt_noise(range(2), (16, 8, 8), seed=0)
    merge_lora(teacher.backbone.module, lora)
    cond, timesteps = teacher.encode_prompts(prompts), contract.timesteps(steps, 1000)
    (ours,) = generate(teacher, cond, timesteps, seed=0, batch_size=2)
    pipeline = StableDiffusionPipeline.from_pretrained(SHIPPED, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(str(folder))
    pipeline.scheduler = TCDScheduler.from_pretrained(folder)
    more = {"timesteps": timesteps.tolist()} if steps == 1 else {"num_inference_steps": steps}
    theirs = pipeline(prompts, latents=noise, guidance_scale=0, eta=0.0, output_type="pt", **more).images
    assert torch.allclose(ours, theirs.float(), atol=1e-3)


@pytest.mark.parametrize("file", ["README.md", "lora_k4/README.md", "lora_unified/README.md", "one_step_unet/README.md"])
def test_what_the_readme_and_the_model_cards_show_samples_in_a_fresh_process(smoke, run, file):
    models = smoke / "data/smoke/06_models"
    text = (ROOT / file if file == "README.md" else models / file).read_text()
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    for shown in ("data/06_models", "path/to/this/folder", f"path/to/{Path(file).parent.name}"):
        code = code.replace(shown, str(models if shown == "data/06_models" else models / Path(file).parent))
    assert run(sys.executable, "-c", f"{code}\nprint(image.size)").stdout.strip() == "(64, 64)"


def executed(name: str, smoke: Path, monkeypatch: pytest.MonkeyPatch, **changed: str) -> tuple[list[Any], dict[str, Any]]:
    """Run a notebook's cells in its folder, with some of its settings changed. What it displayed, and its names."""
    shown: list[Any] = []
    monkeypatch.chdir(smoke / "notebooks")
    monkeypatch.setattr("IPython.display.display", shown.append)
    names: dict[str, Any] = {}
    for cell in json.loads(Path(f"{name}.ipynb").read_text())["cells"]:
        source = "".join(cell["source"])
        for key, value in changed.items():
            source = re.sub(rf"(?m)^{key} = .*$", f"{key} = {value}", source)
        if cell["cell_type"] == "code":
            exec(source, names)
    return shown, names


def test_the_notebook_draws_with_all_that_was_made(smoke, monkeypatch):
    shown, _ = executed("sample_lora", smoke, monkeypatch, DATA='"data/smoke"')
    assert len(shown) == 6 and len({image.tobytes() for image in shown}) == 6


def test_the_notebook_of_feedback_names_a_weight_within_the_limits(smoke, monkeypatch, capsys):
    shown, names = executed("choose_feedback_weight", smoke, monkeypatch, DATA='"data/smoke"', MOST_DISTANCE="100", LEAST_DIVERSITY="0")
    table = names["table"]
    assert names["weight"] == table.weight[table.held_out_reward.idxmax()]
    told = capsys.readouterr().out
    assert f"Weight {names['weight']:g}: the held-out reward gains" in told and len(shown) == 2
    _, names = executed("choose_feedback_weight", smoke, monkeypatch, DATA='"data/smoke"', MOST_DISTANCE="1", LEAST_DIVERSITY="1")
    assert names["weight"] in set(names["allowed"].weight) and 0 in set(names["allowed"].weight)


def test_the_notebook_that_compares_runs_tells_none_from_itself(smoke, monkeypatch, capsys, tmp_path):
    shutil.copytree(smoke / "data/smoke/08_reporting", tmp_path / "other/08_reporting")
    shown, names = executed("compare_runs", smoke, monkeypatch, RUNS=repr(["data/smoke", str(tmp_path / "other")]), MODEL='"k4"')
    assert (names["table"].gain.abs() < 1e-9).all() and {1, 2, 4, 8} <= set(names["table"].steps)
    assert "No difference" in capsys.readouterr().out and len(shown) == 2


def test_mlflow_has_a_run_with_a_nested_run_for_each_stage(smoke):
    client = MlflowClient(f"sqlite:///{smoke / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("hypersd")
    runs = {found.info.run_name: found for found in client.search_runs([experiment.experiment_id])}
    stages = [found for found in runs.values() if "stage" in found.data.tags]
    assert {found.info.run_name for found in stages} == {*(f"tscd_k{k}" for k in (8, 4, 2, 1)), "feedback", "dmd", "one_step_unet"}
    assert {found.info.status for found in runs.values()} == {"FINISHED"}
    parent = runs["full_distill (smoke)"]
    assert parent.data.tags["data_hash"] and len({found.data.tags["data_hash"] for found in stages}) == 1
    assert all(found.data.metrics.keys() >= {"loss", "images_per_second", "peak_memory_mb"} for found in stages)
    for stage in ("tscd_k1", "dmd", "one_step_unet"):
        assert any(name.startswith("clip_score/") for name in runs[stage].data.metrics)
    shown = {name for name in parent.data.metrics if not name.startswith("system/")}
    assert len(shown) <= 12 and {"lower is better/train_seconds", "higher is better/unified 4 steps clip_score"} <= shown
    assert {name.partition("/")[0] for name in shown} == {"lower is better", "higher is better"}
    assert "Distance to reconstructions" in parent.data.tags["mlflow.note.content"]
    assert len({found.dataset.name for found in parent.inputs.dataset_inputs}) == 1
    made = {"lora_k8", "lora_k4", "lora_k2", "lora_k1", "lora_feedback", "lora_unified", "one_step_unet"}
    logged = {path.path for found in stages for path in client.list_artifacts(found.info.run_id)}
    assert made <= logged


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`, key by key."""
    merged = dict(base)
    for key, value in over.items():
        merged[key] = merge(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
    return merged


def make_smoke_the_default(project: Path) -> None:
    """Write the smoke environment's parameters into conf/base, which is what DVC follows."""
    smoke: dict[str, Any] = {}
    for file in sorted((project / "conf/smoke").glob("parameters*.yml")):
        smoke = merge(smoke, yaml.safe_load(file.read_text()) or {})
    for file in sorted((project / "conf/base").glob("parameters*.yml")):
        base = yaml.safe_load(file.read_text()) or {}
        file.write_text(yaml.safe_dump(merge(base, {key: value for key, value in smoke.items() if key in base}), sort_keys=False))


def test_dvc_repeats_nothing_after_a_full_run_then_only_what_a_parameter_changes(smoke, run, tmp_path):
    make_smoke_the_default(smoke)
    shutil.copytree(smoke / "data/smoke", smoke / "data", dirs_exist_ok=True)
    run("kedro", "run", "--pipeline", "full_distill")  # trained stages continue from their last checkpoint, which the copy has
    assert "up to date" in run("dvc", "repro").stdout
    recorded, stages = (yaml.safe_load((smoke / name).read_text())["stages"] for name in ("dvc.lock", "dvc.yaml"))
    assert disagreements(recorded, stages) == [] and not changed(smoke, "data/08_reporting/table")
    head, *lines = run("dvc", "metrics", "show").stdout.rstrip().splitlines()
    assert len(lines) == 12 and max(map(len, [head, *lines])) <= 100  # the teacher twice, five models once, two of them at more steps

    file = smoke / "conf/base/parameters_tscd.yml"
    parameters = yaml.safe_load(file.read_text())
    parameters["tscd_k2"]["stage"]["loop"] = {"steps": 4}
    file.write_text(yaml.safe_dump(parameters, sort_keys=False))
    again = run("dvc", "repro").stdout
    before = ("data_prep", "reference", "tscd_k8", "evaluate_k8", "tscd_k4", "evaluate_k4")
    assert [name for name in before if f"Running stage '{name}'" in again] == []
    after = ("tscd_k2", "evaluate_k2", "tscd_k1", "evaluate_k1", "feedback", "dmd", "one_step_unet", "evaluate_unet", "evaluation")
    assert all(f"Running stage '{name}'" in again for name in after)
    assert "up to date" in run("dvc", "repro").stdout

    run("dvc", "remote", "add", "--local", "--default", "folder", str(tmp_path / "remote"))
    run("dvc", "push")
    weights = smoke / "data/06_models/lora_k1/pytorch_lora_weights.safetensors"
    trained = weights.read_bytes()
    shutil.rmtree(smoke / ".dvc/cache")
    shutil.rmtree(smoke / "data/06_models/lora_k1")
    run("dvc", "pull")
    assert weights.read_bytes() == trained


def test_a_baseline_and_the_ablation_run_on_the_same_data(smoke, run):
    run("kedro", "run", "--env", "smoke", "--pipelines", "baselines", "--tags", "progressive")
    lora = smoke / "data/smoke/06_models/lora_progressive_k1"
    assert (lora / "pytorch_lora_weights.safetensors").exists() and (smoke / "data/smoke/08_reporting/metrics_progressive_k1.json").exists()
    first = run("kedro", "run", "--env", "smoke", "--pipelines", "ablation")
    table = (smoke / "data/smoke/08_reporting/ablation.md").read_text()
    assert "|8-4-2-1 hybrid|1|" in table and "|TCD|1|" in table and "|teacher|1|" in table
    with Image.open(smoke / "data/smoke/08_reporting/ablation.png") as plot:
        assert plot.width > 500
    client = MlflowClient(f"sqlite:///{smoke / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("hypersd")
    cell = next(r for r in client.search_runs([experiment.experiment_id]) if r.info.run_name == "8-4-2-1 hybrid seed 0")
    assert cell.info.status == "FINISHED" and "clip_score/4_steps" in cell.data.metrics and "loss" in cell.data.metrics
    again = run("kedro", "run", "--env", "smoke", "--pipelines", "ablation")
    run("kedro", "run", "--env", "smoke", "--pipelines", "baselines", "--tags", "dmd2")
    assert (smoke / "data/smoke/06_models/lora_dmd2/pytorch_lora_weights.safetensors").exists()
    assert "done before" not in first.stdout + first.stderr and "TCD seed 0: done before" in again.stdout + again.stderr


def test_the_compatibility_report_is_made_of_the_run(smoke, run):
    run("kedro", "run", "--env", "smoke", "--pipelines", "compatibility")
    reports, parts = smoke / "data/smoke/08_reporting", smoke / "data/smoke/06_models/compatibility"
    assert {path.name for path in parts.iterdir()} == {"controlnet_canny", "controlnet_scribble", "base_openmoji", "style_openmoji"}
    table = (reports / "compatibility.md").read_text()
    for row in ("|canny|1|unified|8|", "|scribble|1|unified|1|", "|openmoji|1|unified|4|", "|teacher's base|1|without|2|"):
        assert row in table
    found = json.loads((reports / "compatibility.json").read_text())
    assert 0 < found["controlnet_canny_1"]["unified_4_steps"]["edge_f1_canny"] <= 1
    for name in ("controlnets", "bases"):
        with Image.open(reports / f"compatibility_{name}.png") as grid:
            assert grid.width > 900


def test_a_retraining_promotes_keeps_and_rolls_back_with_its_exit_codes(smoke):
    """As a scheduler sees it."""

    def ended(*arguments: str, **environment: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "kedro", *arguments, "--env", "smoke"]
        env = environment_of(PYTHONPATH=str(smoke / "src"), **environment)
        done = subprocess.run(command, cwd=smoke, env=env, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    code, told = ended("run", "--pipelines", "retrain", HYPERSD_WEBHOOK="http://127.0.0.1:9/secret-path")
    assert code == 0 and "There was no champion" in told, told
    assert told.count("The webhook of HYPERSD_WEBHOOK did not take the decision") == 1 and "secret-path" not in told
    code, told = ended("run", "--pipelines", "retrain")
    assert code == 10 and "The data did not change enough since version 1 was judged" in told and "Traceback" not in told, told
    code, told = ended("rollback")
    assert code == 1 and "version 1 is the first champion" in told and "Traceback" not in told
    assert "version 1 is the champion" not in (smoke / "data/smoke/08_reporting/retrain_report.md").read_text()
