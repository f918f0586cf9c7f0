"""What a user sees on the command line."""

import pytest
from mlflow import MlflowClient

from hypersd_pipeline.checks import registered_pipelines


def error_of(done) -> str:
    """The one line that a failed command printed, with no traceback around it."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    return line


@pytest.mark.parametrize("spelling", ["--pipeline", "--pipelines"])
def test_both_spellings_run_a_pipeline_without_a_warning(small_project, kedro, spelling):
    done = kedro(small_project, "run", spelling, "data_prep")
    assert done.returncode == 0 and "deprecated" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--env", "wrong"], ["conf/wrong/parameters_tscd.yml", "tscd_k1.stage.stepz", "unknown key"]),
        (["--params", "tscd_k2.stage.segments=0"], ["--params", "tscd_k2.stage.segments", "greater than or equal to 1"]),
        (["--pipelines", "full_distil"], ["no pipeline 'full_distil'", "full_distill"]),
        (["--env", "smok"], ["no environment 'smok'", "base"]),
        (["--namespaces", "tscd_k3"], ["tscd_k3"]),
    ],
)
def test_wrong_arguments_and_parameters_are_one_line_and_nothing_runs(small_project, kedro, arguments, told):
    line = error_of(kedro(small_project, "run", *arguments))
    assert all(part in line for part in told), line
    assert not (small_project / "data" / "tscd_k2.csv").exists()
    assert MlflowClient(f"sqlite:///{small_project / 'mlflow.db'}").get_experiment_by_name("hypersd") is None or "--namespaces" in arguments


def test_a_missing_input_names_the_command_that_makes_it(small_project, kedro):
    (small_project / "data" / "metrics_data.json").unlink()
    line = error_of(kedro(small_project, "run"))
    assert "metrics_data.json" in line and "`kedro run --pipelines data_prep --to-outputs metrics_data`" in line


def test_an_error_of_a_node_and_of_a_dataset_is_one_line(small_project, kedro):
    assert "row 7 of data.csv is empty" in error_of(kedro(small_project, "run", FAIL="1"))
    (small_project / "data" / "metrics_data.json").write_text("{")
    assert "metrics_data.json is not valid JSON" in error_of(kedro(small_project, "run"))


def test_catalog_list_shows_the_datasets_of_each_pipeline(small_project, kedro):
    done = kedro(small_project, "catalog", "list")
    assert done.returncode == 0 and "metrics_data" in done.stdout, done.stderr


def test_the_project_registers_its_pipelines(kedro, pytestconfig):
    done = kedro(pytestconfig.rootpath, "registry", "list")
    assert done.returncode == 0, done.stderr
    assert {"__default__", "data_prep", "evaluation", "full_distill", "teacher", "tscd"} <= set(done.stdout.replace("- ", "").split())


def test_registered_names_are_read_without_imports(monkeypatch):
    monkeypatch.setattr("kedro.framework.project.PACKAGE_NAME", "hypersd_pipeline")
    assert {"__default__", "full_distill", "tscd"} <= set(registered_pipelines())


def test_a_misspelt_key_of_a_term_is_said_as_it_was_written(kedro, pytestconfig):
    line = error_of(kedro(pytestconfig.rootpath, "run", "--pipelines", "tscd", "--params", "tscd_k4.stage.terms.consistency.guidanc=3"))
    assert "--params: tscd_k4.stage.terms.consistency.guidanc: unknown key" in line


def test_segmentation_feedback_without_masks_is_refused_before_anything_runs(kedro, pytestconfig, tmp_path):
    parameters = f"data.source.kind=folder,data.source.root={tmp_path}"
    line = error_of(kedro(pytestconfig.rootpath, "run", "--pipelines", "full_distill", "--params", parameters))
    assert "feedback.stage.terms.perceptual" in line and "set it to null" in line


@pytest.mark.parametrize("key", ["feedback.stage.held_out.weights", "feedback.stage.terms.perceptual.model.weights"])
def test_missing_weights_of_a_judge_are_said_before_anything_runs(kedro, pytestconfig, tmp_path, key):
    """Not after days of distillation."""
    line = error_of(kedro(pytestconfig.rootpath, "run", "--pipelines", "full_distill", "--params", f"{key}={tmp_path}/none.safetensors"))
    assert "feedback.stage: " in line and f"{tmp_path}/none.safetensors" in line and "kedro run --pipelines" in line
