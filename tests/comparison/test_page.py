"""Comparing runs: which models, what is refused, and the page in a real browser."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browsers import browser
from compared import PROMPTS, write_run
from mlflow import MlflowClient
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

from hypersd_pipeline.comparison.page import duration, render
from hypersd_pipeline.comparison.runs import ComparedRun, read_run
from hypersd_pipeline.comparison.table import CompareConfig, Comparison, compare_runs
from hypersd_pipeline.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs. ``b`` is better than ``a`` at one and two steps, ``c`` saw other noise."""
    root = tmp_path_factory.mktemp("runs")
    write_run(root / "a", 0.0, "red", 60)
    write_run(root / "b", 20.0, "blue", 150)
    write_run(root / "c", 20.0, "green", 60, seed=1)
    return root


def compared(*folders: Path, **changed: Any) -> Comparison:
    """As MLflow knows them: with parameters, data and code."""
    numbers = {"tscd.loop.steps": "200", "tscd.loop.seed": "0"}

    def find(name: str) -> ComparedRun:
        own = {**numbers, "tscd.loop.steps": "500"} if name.endswith("b") else numbers
        code = {"git_commit": "<script>alert(1)</script>" if name.endswith("b") else "abc"}
        return dataclasses.replace(read_run(Path(name)), parameters=own, data={"data_hash": "same"}, code=code)

    return compare_runs(CompareConfig(runs=tuple(map(str, folders)), **changed), find)


# --- what is compared --------------------------------------------------------------------------------------------------------------------


def test_the_verdict_and_what_differed(runs: Path) -> None:
    found = compared(runs / "a", runs / "b")
    verdict = found.verdicts["B"]
    assert verdict.sentence.startswith("B is better at 1 and 2 steps: its distance is lower by ") and verdict.unpaired is None
    assert verdict.sentence.endswith("at 4 and 8 steps no difference can be told. B was trained 2.5 times as long.")
    assert verdict.winner() == "B is better"
    assert found.differing["parameters"] == {"tscd.loop.steps": ("200", "500")} and not found.differing["data"]
    assert found.metrics[0] == "fd_efficientnet_lite0_recon" and found.steps == (1, 2, 4, 8)
    numbers = found.numbers()["B_less_A"]
    assert numbers["fd_efficientnet_lite0_recon/1_steps_low"] < numbers["fd_efficientnet_lite0_recon/1_steps"] < -15
    assert "A is a (" in found.summary() and verdict.sentence in found.summary()


def test_other_noise_is_said_and_three_runs_compare_with_the_first(runs: Path) -> None:
    found = compared(runs / "a", runs / "b", runs / "c")
    assert list(found.verdicts) == ["B", "C"] and found.verdicts["B"].unpaired is None
    assert "seeds of the noise differ" in str(found.verdicts["C"].unpaired) and "independent samples" in found.summary()


def test_runs_that_trained_other_models_compare_by_their_last(runs: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", 0.0, "red", 1, model="unified")
    assert [entry.model_name for entry in compared(runs / "a", other).entries] == ["k4", "unified"]
    with pytest.raises(UserError, match=r"compare\.model: other has no model 'k4'; choose one of unified, teacher|teacher, unified"):
        compared(runs / "a", other, model="k4")


@pytest.mark.parametrize(
    ("names", "told"), [([], "name two runs at least"), (["a"], "name two runs at least"), (["a", "a"], "stands there twice")]
)
def test_what_cannot_be_compared_is_one_sentence(names: list[str], told: str, runs: Path) -> None:
    with pytest.raises(UserError, match=told):
        compared(*(runs / name for name in names))


def test_a_folder_without_scores_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no scores \(samples_\*/scores\.safetensors\)"):
        read_run(tmp_path)


def test_durations_are_read_at_a_glance() -> None:
    assert [duration(seconds) for seconds in (None, 3.14159, 800, 7260)] == ["–", "3.14 s", "13 min 20 s", "2 h 1 min"]


# --- the command -------------------------------------------------------------------------------------------------------------------------


def test_the_command_writes_the_page_and_tells_mlflow(runs: Path, small_project: Path, kedro: Callable[..., Any]) -> None:
    """Runs are found as folders, and in MLflow by name and by id."""
    package = small_project / "src/small/pipelines/compare"
    package.mkdir()
    for name in ("__init__.py", "pipeline.py"):
        (package / name).write_text("from hypersd_pipeline.pipelines.compare import create_pipeline\n")
    for name in ("catalog_compare.yml", "parameters_compare.yml"):
        shutil.copy(ROOT / "conf/base" / name, small_project / "conf/base")
    client = MlflowClient(f"sqlite:///{small_project / 'mlflow.db'}")
    experiment = client.create_experiment("earlier", artifact_location=(small_project / "artifacts").as_uri())
    logged = []
    for name in ("a", "b"):
        parent = client.create_run(experiment, run_name=f"full_distill {name}").info.run_id
        client.log_param(parent, "tscd.loop.steps", {"a": 200, "b": 500}[name])
        child = client.create_run(experiment, run_name="tscd_k4", tags={"mlflow.parentRunId": parent}).info.run_id
        client.log_artifacts(child, str(runs / name / "08_reporting/samples_k4"), "samples_k4")
        client.log_metric(child, "train_seconds", {"a": 60, "b": 150}[name])
        client.set_terminated(parent)
        logged.append(parent)

    done = kedro(small_project, "compare", "full_distill a", logged[1])
    assert done.returncode == 0, done.stderr
    page = small_project / "data/08_reporting/comparison.html"
    assert "B is better at 1 and 2 steps" in done.stderr and "The page is data/08_reporting/comparison.html." in done.stderr
    assert "tscd.loop.steps" in page.read_text() and "data:image/png;base64," in page.read_text()
    (run,) = client.search_runs([client.get_experiment_by_name("hypersd").experiment_id])
    assert run.data.tags["mlflow.note.content"].startswith("A is full_distill a (")
    assert "B was trained 2.5 times as long" in run.data.tags["mlflow.note.content"]
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["comparison.html"]

    by_folder = kedro(
        small_project, "run", "--pipelines", "compare", "--params", f"compare.runs=[{runs / 'a'},{runs / 'b'}],compare.seed=1"
    )
    assert by_folder.returncode == 0 and "B is better at 1 and 2 steps" in by_folder.stderr, by_folder.stderr
    unknown = kedro(small_project, "compare", "full_distill a", "full_distill z")
    assert unknown.returncode == 1 and "Traceback" not in unknown.stderr
    assert "Error: compare.runs: 'full_distill z' is no data folder, and no id or name of a run in MLflow; choose one of" in unknown.stderr


# --- the page ----------------------------------------------------------------------------------------------------------------------------


def test_the_page_in_a_browser(runs: Path, tmp_path: Path) -> None:
    page = tmp_path / "comparison.html"
    page.write_text(render(compared(runs / "a", runs / "b"), prompts=8, resamples=200, seed=0), encoding="utf-8")
    assert page.stat().st_size < 500_000
    with browser() as opened:
        opened.get(page.as_uri())

        def text(selector: str) -> str:
            return opened.find_element(By.CSS_SELECTOR, selector).text

        def shown(layer: str) -> list[int]:
            """The colour in the middle of the first image, drawn by the browser."""
            script = """const image = document.querySelector(arguments[0]), canvas = document.createElement("canvas");
            canvas.width = canvas.height = 1; const context = canvas.getContext("2d"); context.drawImage(image, 0, 0, 1, 1);
            return Array.from(context.getImageData(0, 0, 1, 1).data).slice(0, 3);"""
            return opened.execute_script(script, f"#prompts .{layer}")

        assert text(".winner") == "B is better" and "lower by" in text(".verdict")
        assert text("#headline tbody tr:nth-child(2)").split()[:2] == ["B", "k4"] and "2 min 30 s" in text("#headline tbody")
        better = opened.find_elements(By.CSS_SELECTOR, "#headline td.better")
        assert len(better) == 2 and all(cell.text.startswith("-") for cell in better)
        assert len(opened.find_elements(By.CSS_SELECTOR, "#curves svg")) == 2
        rows = [row.text for row in opened.find_elements(By.CSS_SELECTOR, "#differing tbody tr")]
        assert rows == ["tscd.loop.steps 200 500", "git_commit abc <script>alert(1)</script>"]
        assert [caption.text for caption in opened.find_elements(By.CSS_SELECTOR, "#prompts figcaption")] == PROMPTS[:4]

        assert (shown("under"), shown("over")) == ([255, 0, 0], [0, 0, 255])
        Select(opened.find_element(By.ID, "right")).select_by_visible_text("teacher")
        Select(opened.find_element(By.ID, "steps")).select_by_visible_text("1 step")
        opened.execute_async_script("setTimeout(arguments[0], 100)")
        assert (shown("under"), shown("over")) == ([255, 0, 0], [128, 128, 128])

        over = opened.find_element(By.CSS_SELECTOR, "#prompts .over")
        before = over.value_of_css_property("clip-path")
        slider = opened.find_element(By.ID, "slider")
        slider.send_keys("\ue012" * 20)  # the left arrow
        assert slider.get_attribute("value") == "30" and over.value_of_css_property("clip-path") != before
        opened.find_element(By.ID, "beside").click()
        assert over.value_of_css_property("clip-path") == "none"

        assert [entry for entry in opened.get_log("browser") if entry["level"] == "SEVERE"] == []
        messages = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
        asked = {m["params"]["request"]["url"].partition(":")[0] for m in messages if m["method"] == "Network.requestWillBeSent"}
        assert asked <= {"file", "data"}  # nothing is loaded from elsewhere
        width = opened.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert width[0] <= width[1]
    with browser(width=400) as narrow:
        narrow.get(page.as_uri())
        width = narrow.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert width[0] <= width[1]
