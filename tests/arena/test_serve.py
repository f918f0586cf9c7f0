"""`kedro run --pipelines arena` on the real command line, and a real browser that samples and votes."""

from __future__ import annotations

import functools
import re
import signal
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from arenas import lora
from browsers import browser
from mlflow import MlflowClient
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait
from servers import environment_of
from tiny import write_teacher

from hypersd_pipeline.arena.config import ArenaConfig
from hypersd_pipeline.arena.serve import bound, is_loopback, prompts_of
from hypersd_pipeline.data.rows import Manifest, Row, write_manifest
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.io.lora import LoRADataset
from hypersd_pipeline.metrics.config import EvaluationConfig
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher

ROOT = Path(__file__).parents[2]
PROMPTS = ("a red fox", "two cats", "an owl")
MANIFEST = Manifest(Path("nowhere"), {"test": tuple(Row(str(i), f"{i}.png", (p,), 64, 64, 0, "0") for i, p in enumerate(PROMPTS))})
HOSTILE = "<img src=x onerror=\"document.title='taken'\">"
CATALOG = """
manifest: {type: hypersd_pipeline.io.tables.ManifestDataset, filepath: "${data:03_primary}/manifest"}
"lora_{k}": {type: hypersd_pipeline.io.LoRADataset, filepath: "${data:06_models}/lora_{k}"}
"""


@pytest.fixture
def project(small_project: Path) -> Path:
    """The small project with the real arena, a tiny random teacher and a random LoRA."""
    package = small_project / "src/small/pipelines/arena"
    package.mkdir()
    (package / "__init__.py").write_text("from .pipeline import create_pipeline\n")
    (package / "pipeline.py").write_text("from hypersd_pipeline.pipelines.arena.pipeline import create_pipeline\n")
    (small_project / "conf/base/catalog_arena.yml").write_text((ROOT / "conf/base/catalog_arena.yml").read_text())
    (small_project / "conf/base/catalog_models.yml").write_text(CATALOG)
    config = TeacherConfig(source=str(write_teacher(small_project / "data", "sd15")))
    arena = {"shown": {"teacher": [1, 3], "k4": [1, 4]}, "voted": {"teacher": [3], "k4": [4]}, "port": 0, "votes_per_voter": 3}
    parameters = {"teacher": {"source": config.source}, "evaluation": {"samples": 4, "unseen_samples": 4}, "arena": arena}
    (small_project / "conf/base/parameters_arena.yml").write_text(yaml.safe_dump(parameters))
    LoRADataset(filepath=str(small_project / "data/06_models/lora_k4")).save(lora(load_teacher(config), 2, "conv2", 1))
    write_manifest(small_project / "data/03_primary/manifest", MANIFEST)
    return small_project


@contextmanager
def served(project: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The command, from when its page is open: the page's address, and the process, which is to be ended."""
    command = [sys.executable, "-m", "kedro", "run", "--pipelines", "arena"]
    environment = environment_of(TMPDIR=str(project / "tmp"))
    (project / "tmp").mkdir()
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what a shell starts in the background ignores Ctrl-C
    process = subprocess.Popen(
        command, cwd=project, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=heard
    )
    try:
        said = ""
        assert process.stdout is not None
        for line in process.stdout:
            said += line
            if found := re.search(r"open at (http://\S+?)\.", line.replace("127.0.0.1", "127-0-0-1")):
                yield found[1].replace("127-0-0-1", "127.0.0.1"), process
                return
        raise AssertionError(said)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def one(page: Chrome, name: str) -> WebElement:
    return page.find_element(By.CSS_SELECTOR, f'[data-arena="{name}"]')


def wait(page: Chrome) -> WebDriverWait:
    return WebDriverWait(page, 60, ignored_exceptions=None)


def picture(page: Chrome, name: str) -> str:
    """The address of an image that is seen, or nothing."""
    shown = one(page, name)
    images = shown.find_elements(By.TAG_NAME, "img")
    return images[0].get_attribute("src") or "" if shown.is_displayed() and images else ""


def ready(page: Chrome) -> bool:
    return one(page, "vote-left").is_enabled() and bool(picture(page, "left") and picture(page, "right"))


def votes(project: Path) -> list[tuple[str, ...]]:
    with sqlite3.connect(project / "data/08_reporting/arena/votes.db") as database:
        return database.execute("select choice, prompt, left_name, right_name, voter from arena_votes order by at").fetchall()


def test_people_sample_and_vote_and_mlflow_has_the_scores(project):
    before = {path for path in project.rglob("*") if path.is_file()}
    with served(project) as (address, process), browser() as page:
        page.get(address)
        wait(page).until(lambda p: one(p, "generate").is_displayed())
        # a prompt's images beside each other, with their times
        one(page, "prompt").send_keys(HOSTILE)
        one(page, "generate").click()
        shown = ("teacher_1_steps", "teacher_3_steps", "k4_1_steps", "k4_4_steps")
        wait(page).until(lambda p: all(picture(p, name) for name in shown) and one(p, f"time-{shown[-1]}").text)
        assert len({picture(page, name) for name in shown}) == 4
        assert all(re.fullmatch(r"\d+\.\d\d s", one(page, f"time-{name}").text) for name in shown)
        assert one(page, "told").text == HOSTILE and page.title == "Hyper-SD arena"  # text, and no code
        # longer than the field lets a visitor write
        page.execute_script("arguments[0].removeAttribute('maxlength')", one(page, "prompt"))
        one(page, "prompt").send_keys("x" * 300)
        one(page, "generate").click()
        wait(page).until(lambda p: "at most 300 characters" in one(p, "told").text)
        # three blind pairs, and then no more
        one(page, "tab-vote").click()
        for choice in ("left", "right", "neither"):
            wait(page).until(ready)
            assert one(page, "vote-prompt").text in PROMPTS
            panel = page.find_element(By.CSS_SELECTOR, ".q-tab-panel").get_attribute("outerHTML") or ""
            seen = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", panel)
            assert "data-arena" in seen and not re.search("k4|teacher|steps", seen)  # not even in the page's source
            assert len({picture(page, side) for side in ("left", "right")}) == 2
            one(page, f"vote-{choice}").click()
            wait(page).until(lambda p: not one(p, "vote-left").is_enabled() or ready(p))
            wait(page).until(lambda p: ready(p) or "Thank you" in one(p, "vote-told").text)
        wait(page).until(lambda p: "Thank you" in one(p, "vote-told").text)
        assert not one(page, "vote-left").is_enabled()
        given = votes(project)
        assert [choice for choice, *_ in given] == ["left", "right", "neither"] and len({voter for *_, voter in given}) == 1
        assert all(prompt in PROMPTS and {a, b} == {"teacher_3_steps", "k4_4_steps"} for _, prompt, a, b, _ in given)
        # nothing came from elsewhere, and nothing failed
        loaded = page.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
        assert loaded and all(name.startswith(address) for name in loaded)
        assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []
        # another site's name that points here
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(urllib.request.Request(address, headers={"Host": "evil.example"}), timeout=10)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "3 votes of 1 voters" in said and "Traceback" not in said, said
    table = (project / "data/08_reporting/arena/votes.md").read_text()
    assert "3 votes of 1 voters. 33% found no difference." in table
    made = {path for path in project.rglob("*") if path.is_file() and "__pycache__" not in path.parts} - before
    known = ("data", "mlartifacts", ".viz")  # what Kedro-Viz and MLflow write are the last two
    strays = [path for path in made if path.relative_to(project).parts[0] not in known and "mlflow" not in path.name]
    assert strays == []  # no temporary file either
    client = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'hypersd'")
    (run,) = client.search_runs([experiment.experiment_id], "tags.stage = 'arena'")
    metrics = run.data.metrics
    assert metrics["votes"] == 3 and metrics["win_rate/k4_4_steps"] + metrics["win_rate/teacher_3_steps"] == pytest.approx(1)
    assert metrics["win_rate/k4_4_steps_low"] <= metrics["win_rate/k4_4_steps"] <= metrics["win_rate/k4_4_steps_high"] != 0
    assert metrics["bradley_terry/k4_4_steps"] + metrics["bradley_terry/teacher_3_steps"] == pytest.approx(2000)
    assert metrics["images"] >= 6 and metrics["seconds/k4_4_steps"] > 0


def test_a_missing_lora_is_one_sentence_before_anything_is_recorded(project, kedro):
    lost = project / "data/06_models/lora_k4/pytorch_lora_weights.safetensors"
    lost.unlink()
    done = kedro(project, "run", "--pipelines", "arena")
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error")]
    assert f"'lora_k4' ({lost.parent}) is missing" in line and "arena.shown" in line
    assert not (project / "data/08_reporting/arena").exists()


def test_where_the_page_is_served():
    values = {"shown": {"teacher": (1,)}, "voted": {"teacher": (1, 2)}}
    with bound(ArenaConfig(**values, port=0)) as listening:
        assert listening.getsockname()[0] == "127.0.0.1"
        taken = listening.getsockname()[1]
        with pytest.raises(UserError, match=rf"arena.port: 127.0.0.1:{taken} cannot be used \(Address already in use\)"):
            bound(ArenaConfig(**values, port=taken))
    with pytest.raises(UserError, match=r"arena.host: 'no.such.host.invalid' is no address"):
        bound(ArenaConfig(**values, host="no.such.host.invalid"))
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "192.168.1.2")] == [True, True, True, False, False]


def test_pairs_are_for_the_test_split_s_captions_or_for_given_prompts():
    arena, evaluation = ArenaConfig(shown={"teacher": (1,)}, voted={"teacher": (1, 2)}), EvaluationConfig(samples=4, unseen_samples=4)
    assert prompts_of(arena, evaluation, MANIFEST) == list(PROMPTS)
    assert prompts_of(arena.model_copy(update={"prompts": (" a fox ", " ")}), evaluation, Manifest(Path("x"))) == ["a fox"]
    with pytest.raises(UserError, match=r"arena.prompts: the data has no captions in the split 'test'"):
        prompts_of(arena, evaluation, Manifest(Path("x")))
