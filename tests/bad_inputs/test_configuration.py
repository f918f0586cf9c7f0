"""One fault at a time in the files of ``conf/`` or in ``--params``: each is refused in one sentence that names the file and the key."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kedro.framework.cli.utils import _split_params
from kedro.framework.project import pipelines
from kedro.framework.startup import bootstrap_project
from kedro.io import DataCatalog, MemoryDataset
from kedro.pipeline import Node, Pipeline
from pydantic import ValidationError

from hypersd_pipeline import checks, config_loader
from hypersd_pipeline.config_loader import ProjectConfigLoader
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.metrics.config import EvaluationConfig
from hypersd_pipeline.models.teacher import TeacherConfig
from hypersd_pipeline.settings import CONFIG_LOADER_ARGS
from hypersd_pipeline.training.config import StageConfig
from hypersd_pipeline.training.loop import LoopConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def project() -> Iterator[None]:
    """All pipelines are asked for, as by no command."""
    bootstrap_project(ROOT)
    pipelines.set_requested(None)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield


def loader(conf: Path, params: dict[str, Any] | None = None, env: str | None = None) -> ProjectConfigLoader:
    return ProjectConfigLoader(str(conf), env=env, runtime_params=params or {}, **CONFIG_LOADER_ARGS)


@pytest.fixture(scope="module")
def base(project: None) -> ProjectConfigLoader:
    """The project's own configuration, read once."""
    read = loader(ROOT / "conf")
    assert read._parameters_with_likes and read.parameter_files
    return read


def with_params(base: ProjectConfigLoader, params: dict[str, Any]) -> ProjectConfigLoader:
    """A loader of the project's configuration and ``--params`` that does not read the files again."""
    mine = loader(ROOT / "conf", params)
    mine.__dict__["_parameters_with_likes"] = config_loader._merged(base._parameters_with_likes, params)
    mine.__dict__["parameter_files"] = base.parameter_files
    return mine


def told(action: Any) -> str:
    """The one sentence of a refusal."""
    with pytest.raises(UserError) as caught:
        action()
    sentence = str(caught.value)
    assert "\n" not in sentence and "Traceback" not in sentence and sentence.endswith((".", "?")) and len(sentence) < 600, sentence
    return sentence


def parsed(text: str) -> dict[str, Any]:
    """``--params`` as the command line reads it."""
    return _split_params(None, None, text)


PARAMS: list[tuple[str, list[str]]] = [
    # sections and keys that nothing reads
    ("tsdc.loop.steps=3", ["tsdc", "nothing reads", "'tscd'"]),
    ("evalution.samples=5", ["evalution", "'evaluation'"]),
    ("steps=3", ["steps: nothing reads this key"]),
    ("tscd_k8.stagee.loop.steps=3", ["tscd_k8.stagee", "'stage'"]),
    ("tscd_k8.loop.steps=3", ["tscd_k8.loop", "nothing reads"]),
    ("reward_text_image.trainning.loop.steps=3", ["reward_text_image.trainning", "'training'"]),
    ("extends=smoke", ["extends", "only a parameters file"]),
    # unknown keys at every depth
    ("teacher.sauce=x", ["teacher.sauce", "'source'"]),
    ("data.source.trian=5", ["data.source.trian", "'train'"]),
    ("data.batchsize=5", ["data.batchsize", "'batch_size'"]),
    ("tscd.loop.stepz=3", ["loop.stepz", "'steps'"]),
    ("tscd.lora.ranks=3", ["lora.ranks", "'rank'"]),
    ("tscd.terms.consistency.gidance=3", ["terms.consistency.gidance", "'guidance'"]),
    ("tscd.sampling.etaa=0", ["sampling.etaa", "'eta'"]),
    ("dmd.stage.terms.matching.critic.update=3", ["critic.update:", "'updates'"]),
    ("dmd.stage.terms.regression.pairs.cuont=3", ["pairs.cuont", "'count'"]),
    ("dmd.stage.sample.timesteps=3", ["sample.timesteps", "'timestep'"]),
    ("feedback.stage.guard.evry=3", ["guard.evry", "'every'"]),
    ("feedback.stage.terms.quality.alhpa=3", ["terms.quality.alhpa", "'alpha'"]),
    ("feedback.stage.terms.text_image.reward.wieghts=x", ["text_image.reward.wieghts:", "'weights'"]),
    ("evaluation.features.knid=x", ["evaluation.features.knid", "'kind'"]),
    ("evaluation.clip.modell=x", ["evaluation.clip.modell", "'model'"]),
    ("ablation.tscd.k8.loop.stepz=3", ["ablation.tscd.k8.loop.stepz", "'steps'"]),
    ("replicates.chain.feedback.guard.evry=3", ["replicates.chain.feedback.guard.evry", "'every'"]),
    ("segmentation_model.model.group=3", ["segmentation_model.model.group:", "'groups'"]),
    ("teacher_training.vae.loop.stepz=3", ["teacher_training.vae.loop.stepz", "'steps'"]),
    # kinds
    ("data.source.kind=foler", ["data.source", "'foler'", "'folder'"]),
    ("feedback.stage.held_out.kind=clip", ["feedback.stage.held_out", "'clip'"]),
    ("feedback.stage.terms.perceptual.model.kind=yolo", ["terms.perceptual.model", "'yolo'"]),
    ("feedback.stage.terms.extra.weight=1", ["terms.extra needs a kind"]),
    ("teacher=shipped", ["teacher: a section with keys is needed"]),
    ("tscd_k8.stage.loop=5", ["loop: a section with keys is needed"]),
    ("tscd_k8.stage.terms.consistency=5", ["terms.consistency", "5"]),
    # numbers that are none
    ("tscd.loop.learning_rate=nan", ["loop.learning_rate", "finite"]),
    ("tscd.loop.learning_rate=inf", ["loop.learning_rate", "finite"]),
    ("tscd.loop.learning_rate=fast", ["loop.learning_rate", "'fast'"]),
    ("tscd.loop.learning_rate=0", ["loop.learning_rate", "greater than 0"]),
    ("tscd.loop.learning_rate=1e9", ["loop.learning_rate", "less than or equal to 10"]),
    ("tscd.loop.steps=0", ["loop.steps", "greater than or equal to 1"]),
    ("tscd.loop.steps=-5", ["loop.steps", "-5"]),
    ("tscd.loop.steps=2.5", ["loop.steps", "integer"]),
    ("tscd.loop.steps=true", ["loop.steps", "'true'"]),
    ("tscd.loop.steps=1" + "0" * 30, ["loop.steps", "less than"]),
    ("tscd.loop.batch_size=0", ["loop.batch_size"]),
    ("tscd.loop.accumulate=5", ["batch_size 32 is not a multiple of accumulate 5"]),
    ("compute.processes=3", ["tscd_k8.stage.loop.batch_size", "cannot be shared by 3 processes; use a multiple of 3"]),
    ("compute.nodes=2", ["compute", "set rendezvous to host:port of one of them"]),
    ("tscd.loop.seed=-1", ["loop.seed", "greater than or equal to 0"]),
    ("tscd.loop.seed=9223372036854775808", ["loop.seed", "less than 9223372036854775808"]),
    ("tscd.loop.max_grad_norm=.inf", ["loop.max_grad_norm", "finite"]),
    ("tscd.loop.weight_decay=-1", ["loop.weight_decay"]),
    ("tscd.loop.warmup_steps=-1", ["loop.warmup_steps"]),
    ("tscd.loop.betas=[0.9\\,2]", ["loop.betas"]),
    ("tscd.loop.mixed_precision=fp16", ["loop.mixed_precision", "'no' or 'bf16'"]),
    ("tscd.loop.optimizer=sgd", ["loop.optimizer", "'adamw'"]),
    ("tscd.loop.checkpoint_every=0", ["loop.checkpoint_every"]),
    ("tscd.ema_decay=1", ["ema_decay", "less than 1"]),
    ("tscd.lora.rank=0", ["lora.rank"]),
    ("tscd.lora.rank=1000000", ["lora.rank", "less than"]),
    ("tscd.lora.target_modules=[]", ["lora.target_modules", "at least 1"]),
    ("tscd.lora.target_modules=to_q", ["lora.target_modules"]),
    ("tscd.terms.consistency.weight=nan", ["terms.consistency.weight", "finite"]),
    ("tscd.terms.consistency.weight=-1", ["terms.consistency.weight"]),
    ("tscd.terms.consistency.guidance=[1\\,inf]", ["terms.consistency.guidance.1", "finite"]),
    ("tscd.terms.consistency.guidance=[5\\,2]", ["terms.consistency", "rising pair"]),
    ("tscd.terms.consistency.guidance=[2\\,1e6]", ["terms.consistency.guidance.1", "100"]),
    ("tscd.terms.consistency.offset_noise=-1", ["offset_noise"]),
    ("tscd.terms.consistency.solver_points=0", ["solver_points"]),
    ("tscd.sampling.eta=2", ["sampling.eta"]),
    ("tscd.sampling.one_step_timestep=-3", ["sampling.one_step_timestep"]),
    ("feedback.stage.merge_weights=[nan]", ["merge_weights.0", "finite"]),
    ("feedback.stage.merge_weights=[0]", ["merge_weights.0", "greater than 0"]),
    ("feedback.stage.merge_weights=[]", ["merge_weights"]),
    ("feedback.stage.merge_weights=[0.5\\,0.501]", ["merge_weights", "two decimals"]),
    ("feedback.stage.terms.quality.alpha=nan", ["terms.quality.alpha", "finite"]),
    ("feedback.stage.guard.tolerance=-1", ["guard.tolerance"]),
    ("feedback.stage.test_images=0", ["test_images"]),
    ("feedback.stage.sample.gradient_steps=9", ["gradient_steps is 9", "more than the 4"]),
    ("feedback.stage.sample.steps=0", ["sample.steps"]),
    ("feedback.stage.held_out.kind=shipped_quality,feedback.stage.held_out.weights=null", ["feedback.stage"]),
    ("dmd.stage.sample.steps=4", ["timestep is for one step only"]),
    ("dmd.stage.sample.timestep=0", ["sample.timestep"]),
    ("dmd.stage.terms.matching.renoise=[0.9\\,0.1]", ["renoise", "rising pair"]),
    ("dmd.stage.terms.matching.critic.updates=0", ["critic.updates"]),
    ("dmd.stage.terms.regression.pairs.steps=0", ["pairs.steps"]),
    ("dmd.stage.terms.adversarial.hidden=33", ["hidden is 33", "multiple of 32"]),
    ("dmd.stage.feedback_weight=inf", ["feedback_weight", "finite"]),
    ("evaluation.samples=2", ["evaluation.samples"]),
    ("evaluation.guidance_scale=0.5", ["evaluation.guidance_scale"]),
    ("evaluation.guidance_scale=1e9", ["evaluation.guidance_scale"]),
    ("evaluation.student_steps=[0]", ["evaluation.student_steps.0"]),
    ("evaluation.student_steps=[]", ["evaluation.student_steps"]),
    ("evaluation.teacher_steps=[5000]", ["evaluation.teacher_steps.0"]),
    ("evaluation.features.kind=clip", ["evaluation.features.kind", "'inception'"]),
    ("evaluation.features.sha256=xyz", ["evaluation.features.sha256"]),
    ("evaluation.bootstrap=1", ["evaluation.bootstrap"]),
    ("evaluation.seed=-1", ["evaluation.seed"]),
    ("teacher.resolution=-64", ["teacher.resolution"]),
    ("teacher.resolution=1000000", ["teacher.resolution"]),
    ("teacher.dtype=float8", ["teacher.dtype", "'float32'"]),
    ("teacher.layout=sd3", ["teacher.layout", "'sdxl'"]),
    ("ablation.budget=0", ["ablation.budget"]),
    ("ablation.budget=nan", ["ablation.budget", "finite"]),
    ("ablation.shares=[1\\,1\\,1\\,1]", ["ablation.shares", "add up to 1"]),
    ("ablation.seeds=[-1]", ["ablation.seeds.0"]),
    ("replicates.seeds=[]", ["replicates.seeds"]),
    ("unified_sampling.etas=[7]", ["unified_sampling.etas.0"]),
    ("unified_sampling.steps=[0]", ["unified_sampling.steps.0"]),
    ("unified_sampling.grids=[karras]", ["unified_sampling.grids.0", "'trailing' or 'tcd'"]),
    ("segmentation_model.model.input_size=100", ["segmentation_model.model.input_size", "multiple of 32"]),
    ("teacher_training.unet.min_snr_gamma=inf", ["teacher_training.unet.min_snr_gamma", "finite"]),
    # what does not go together
    ("tscd_k8.stage.terms.consistency.segments=4", ["tscd_k8.stage", "is 4, but the stage is named k8"]),
    ("tscd_k1.stage.terms.consistency.segments=2", ["tscd_k1.stage", "use 1"]),
    ("ablation.tscd.k4.terms.consistency.segments=8", ["ablation.tscd.k4", "use 4"]),
    ("tscd_k8.stage.terms.consistency.segments=3", ["tscd_k8.stage.terms.consistency.segments"]),
    ("tscd.terms.consistency.solver_points=12", ["solver_points: 12 is no multiple of segments: 8"]),
    ("tscd_k8.stage.terms.consistency.teacher=previous_stage", ["previous_stage needs a stage before"]),
    ("tscd_k8.stage.terms.consistency=null", ["tscd_k8.stage"]),
    (
        "tscd_k8.stage.terms.consistency.weight=0,tscd_k8.stage.terms.adversarial.weight=1,tscd_k8.stage.terms.adversarial.pair=false",
        ["tscd_k8.stage.terms.consistency", "needs this term"],
    ),
    ("feedback.stage.terms.perceptual.steps=9", ["terms.perceptual.steps is 9"]),
    ("feedback.stage.terms.quality=null,feedback.stage.terms.text_image=null", ["at least one reward"]),
]


@pytest.mark.parametrize(("params", "words"), PARAMS, ids=[row[0][:60] for row in PARAMS])
def test_params_with_one_fault_are_refused(base, params, words):
    given = parsed(params) if "[" not in params else parsed_lists(params)
    sentence = told(lambda: checks.check_parameters(with_params(base, given), ROOT))
    assert all(word in sentence for word in words), sentence
    assert sentence.startswith(("--params: ", "conf/base/parameters_")), sentence


def parsed_lists(params: str) -> dict[str, Any]:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.from_dotlist([params.replace("\\,", ",")]))  # type: ignore[return-value]


def test_the_source_of_a_fault_in_params_is_named():
    assert told(lambda: checks.check_parameters(loader(ROOT / "conf", parsed("tscd.loop.steps=0")), ROOT)).startswith("--params: ")


@pytest.mark.parametrize(
    "params",
    ["mlflow_run_name=x", "tscd.loop.mixed_precision=no", "tscd.loop.mixed_precision=false", "_note=1", "tscd.loop.learning_rate=1e-3"],
)
def test_good_params_pass(base, params):
    checks.check_parameters(with_params(base, parsed(params)), ROOT)


def test_yaml_s_no_is_the_word_and_no_number(tmp_path):
    conf = shutil.copytree(ROOT / "conf", tmp_path / "conf")
    (conf / "mine").mkdir()
    (conf / "mine" / "parameters.yml").write_text("tscd: {loop: {mixed_precision: no}}\n")
    mine = loader(conf, env="mine")
    checks.check_parameters(mine, tmp_path)
    values = mine["parameters"]["tscd_k8"]["stage"]
    assert values["loop"]["mixed_precision"] is False and StageConfig.model_validate(values).loop.mixed_precision == "no"
    for wrong in ({"steps": True}, {"betas": (True, 0.5)}, {"log_every": False}):
        with pytest.raises(ValidationError):
            LoopConfig.model_validate({"steps": 1, "batch_size": 1, "learning_rate": 0.1, **wrong})


# --- files -------------------------------------------------------------------------------------------------------------------------------

FILES: list[tuple[str, str, bytes, str, list[str]]] = [
    ("a tab", "conf/mine/parameters.yml", b"tscd:\n\tloop: {}\n", "parameters", ["line 2", "no YAML"]),
    ("not closed", "conf/mine/parameters.yml", b"tscd: {loop: {steps: 3}\ndata: {}\n", "parameters", ["line 2", "no YAML"]),
    ("two colons", "conf/mine/parameters.yml", b"tscd: loop: 3\n", "parameters", ["line 1", "no YAML"]),
    (
        "a key twice",
        "conf/mine/parameters.yml",
        b"tscd:\n  loop: {steps: 3}\n  loop: {steps: 4}\n",
        "parameters",
        ["line 3", "tscd.loop", "line 2"],
    ),
    ("a list", "conf/mine/parameters.yml", b"- tscd\n", "parameters", ["line 1", "a list"]),
    ("another encoding", "conf/mine/parameters.yml", b"a: 1\nb: caf\xe9\n", "parameters", ["line 2", "no UTF-8"]),
    ("a zero byte", "conf/mine/parameters.yml", b"a: \x00\n", "parameters", ["no YAML"]),
    ("an anchor that is none", "conf/mine/parameters.yml", b"tscd: *loop\n", "parameters", ["line 1", "loop"]),
    ("a tag that runs code", "conf/mine/parameters.yml", b"a: !!python/object/apply:os.system ['true']\n", "parameters", ["line 1", "tag"]),
    ("nested too deeply", "conf/mine/parameters.yml", b"a: " + b"{b: " * 3000 + b"1" + b"}" * 3000, "parameters", ["nested too deeply"]),
    (
        "leads nowhere",
        "conf/mine/parameters.yml",
        b"tscd: {loop: {steps: '${no.such}'}}\n",
        "parameters",
        ["line 1", "tscd.loop.steps", "${no.such}"],
    ),
    ("no such resolver", "conf/mine/parameters.yml", b"a: 1\nb: '${nores:1}'\n", "parameters", ["line 2", "nores"]),
    ("no such variable", "conf/mine/parameters.yml", b"b: '${oc.env:NOT_THERE_AT_ALL}'\n", "parameters", ["line 1", "NOT_THERE_AT_ALL"]),
    ("interpolation not closed", "conf/mine/parameters.yml", b"b: '${tscd'\n", "parameters", ["line 1", "${tscd"]),
    ("interpolations in a circle", "conf/mine/parameters.yml", b"b: '${c}'\nc: '${b}'\n", "parameters", ["leads nowhere"]),
    ("extends that is no YAML", "conf/mine/parameters.yml", b"extends: [sd15\n", "parameters", ["line 2", "no YAML"]),
    (
        "a value in two files",
        "conf/mine/parameters_b.yml",
        b"tscd: {loop: {steps: 5}}\n",
        "parameters",
        ["tscd.loop.steps", "parameters_a.yml"],
    ),
    ("JSON cut off", "conf/mine/parameters.json", b'{"tscd": ', "parameters", ["parameters.json", "no YAML"]),
    ("catalog no YAML", "conf/mine/catalog.yml", b"a: {type: [}\n", "catalog", ["line 1", "no YAML"]),
    ("catalog section twice", "conf/mine/catalog_b.yml", b"\na: {type: x}\n", "catalog", ["line 2", "'a'", "catalog_a.yml"]),
    (
        "catalog leads nowhere",
        "conf/mine/catalog.yml",
        b"a: {type: x, filepath: '${globals:root}/x'}\n",
        "catalog",
        ["line 1", "globals:root"],
    ),
    ("tracking no YAML", "conf/mine/mlflow.yml", b"server: {\n", "mlflow", ["line 2", "no YAML"]),
    ("credentials no YAML", "conf/mine/credentials.yml", b"a: b: c\n", "credentials", ["line 1", "no YAML"]),
]


@pytest.mark.parametrize(("file", "content", "key", "words"), [row[1:] for row in FILES], ids=[row[0] for row in FILES])
def test_a_file_with_one_fault_is_named_with_its_line(tmp_path, file, content, key, words):
    shutil.copytree(ROOT / "conf" / "base", tmp_path / "conf" / "base")
    (tmp_path / "conf" / "mine").mkdir()
    for name, text in {"parameters_a.yml": "tscd: {loop: {steps: 4}}\n", "catalog_a.yml": "a: {type: x}\n"}.items():
        if name.startswith(key) and Path(file).stem.endswith("_b"):
            (tmp_path / "conf" / "mine" / name).write_text(text)
    (tmp_path / file).write_bytes(content)
    sentence = told(lambda: loader(tmp_path / "conf", env="mine")[key])
    assert Path(file).name in sentence and all(word in sentence for word in words), sentence


SECTIONS: list[tuple[str, str, str, list[str]]] = [
    ("a misspelt section", "parameters_tscd.yml", "tsdc: {loop: {steps: 3}}\n", ["conf/mine/parameters_tscd.yml", "tsdc", "'tscd'"]),
    ("a misspelt section in it", "parameters.yml", "feedback: {satge: {}}\n", ["conf/mine/parameters.yml", "feedback.satge", "'stage'"]),
    ("only text", "parameters.yml", "hello\n", ["conf/mine/parameters.yml", "hello"]),
    ("a number as a key", "parameters.yml", "1: 2\n", ["conf/mine/parameters.yml", "1: nothing reads"]),
    ("a misspelt key", "parameters.yml", "tscd: {loop: {stepz: 3}}\n", ["conf/mine/parameters.yml", "loop.stepz", "'steps'"]),
    ("a value that is wrong", "parameters.yml", "evaluation: {seed: .nan}\n", ["conf/mine/parameters.yml", "evaluation.seed", "finite"]),
    (
        "segments that differ",
        "parameters.yml",
        "tscd_k8: {stage: {terms: {consistency: {segments: 4}}}}\n",
        ["conf/mine/parameters.yml", "k8"],
    ),
    ("like that leads nowhere", "parameters.yml", "tscd_k8: {stage: {like: tsdc}}\n", ["conf/mine/parameters.yml", "tsdc"]),
    ("no type", "catalog.yml", "latents: {filepath: x}\n", ["catalog.yml: line 1", "latents", "has no type"]),
    ("no section", "catalog.yml", "\nlatents: x\n", ["catalog.yml: line 2", "latents: is no section"]),
    ("type a number", "catalog.yml", "\nlatents: {type: 5}\n", ["catalog.yml: line 2", "latents", "has no type"]),
    ("unknown key", "mlflow.yml", "server: {}\ntracing: {}\n", ["mlflow.yml: line 2", "tracing", "unknown key"]),
    ("unknown key in it", "mlflow.yml", "server:\n  uri: x\n", ["mlflow.yml: line 2", "server.uri", "unknown key"]),
    ("value of another kind", "mlflow.yml", "tracking: {experiment: {name: [1]}}\n", ["mlflow.yml: line 1", "tracking.experiment.name"]),
    ("strategy unknown", "mlflow.yml", "tracking: {params: {long_params_strategy: cut}}\n", ["mlflow.yml", "long_params_strategy"]),
]


@pytest.mark.parametrize(("file", "content", "words"), [row[1:] for row in SECTIONS], ids=[row[0] for row in SECTIONS])
def test_an_environment_with_one_fault_is_refused(tmp_path, monkeypatch, file, content, words):
    shutil.copytree(ROOT / "conf" / "base", tmp_path / "conf" / "base")
    (tmp_path / "conf" / "mine").mkdir()
    (tmp_path / "conf" / "mine" / file).write_text(content)
    monkeypatch.chdir(tmp_path)
    found = loader(tmp_path / "conf", env="mine")

    def all_checks() -> None:
        checks.check_parameters(found, tmp_path)
        checks.check_catalog(found)
        checks.check_tracking(found)

    sentence = told(all_checks)
    assert all(word in sentence for word in words), sentence


def test_a_section_that_only_another_one_is_like_is_read(tmp_path):
    shutil.copytree(ROOT / "conf" / "base", tmp_path / "conf" / "base")
    (tmp_path / "conf" / "mine").mkdir()
    mine = tmp_path / "conf" / "mine" / "parameters.yml"
    mine.write_text("shared: {steps: 7}\nnumber: 5\ntscd: {loop: {like: shared, batch_size: '${number}'}}\n_note: {any: thing}\n")
    found = loader(tmp_path / "conf", env="mine")
    checks.check_parameters(found, tmp_path)
    assert found["parameters"]["tscd_k8"]["stage"]["loop"]["batch_size"] == 5


def test_which_pipelines_were_asked_for_is_left_as_it_was():
    pipelines.set_requested(["data_prep"])
    try:
        checks.check_parameters(loader(ROOT / "conf"), ROOT)
        assert set(pipelines) == {"data_prep"}
    finally:
        pipelines.set_requested(None)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"type": "hypersd_pipeline.io.NoSuchDataset"}, ["NoSuchDataset"]),
        ({"type": "hypersd_pipeline.io.LoRADataset"}, ["filepath"]),
        ({"type": "hypersd_pipeline.io.LoRADataset", "filepath": "x", "colour": "red"}, ["colour"]),
        ({"type": "no_such_package.Dataset", "filepath": "x"}, ["no_such_package"]),
    ],
)
def test_a_dataset_that_cannot_be_made_is_named(entry, words):
    def action() -> None:
        catalog = DataCatalog.from_config({"lora_k8": entry})
        checks.check_datasets(Pipeline([Node(lambda x: x, "lora_k8", "y", name="n")]), catalog)

    try:
        sentence = told(action)
    except Exception as error:  # Kedro tells some of them when the catalog is made
        pytest.fail(f"{type(error).__name__}: {error}")
    assert "lora_k8" in sentence and all(word in sentence for word in words), sentence


# --- against the teacher -----------------------------------------------------------------------------------------------------------------

AGAINST: list[tuple[str, str, list[str]]] = [
    ("timestep beyond the end", "dmd.stage.sample.timestep=1000", ["dmd.stage.sample.timestep is 1000", "999"]),
    ("first beyond the end", "tscd_k4.stage.sampling.one_step_timestep=2000", ["tscd_k4.stage.sampling.one_step_timestep is 2000", "999"]),
    ("first of the ablation", "ablation.one_step_timestep=1000", ["ablation", "1000", "999"]),
    ("a module that there is not", "tscd.lora.target_modules=[to_q,to_z]", ["stage.lora.target_modules", "'to_z'"]),
    ("resolution no multiple", "teacher.resolution=100", ["teacher.resolution: 100", "use 96"]),
    ("no such folder", "teacher.source=no/such/folder", ["teacher.source", "no/such/folder"]),
    ("another layout", "teacher.layout=sdxl", ["teacher.layout", "'sdxl'"]),
    ("no such variant", "teacher.variant=fp8", ["teacher.variant", "fp8"]),
    ("a grid that does not divide", "tscd.terms.consistency.solver_points=48", ["solver_points: 48", "1000", "use 40"]),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Verdicts of this module alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize(("params", "words"), [row[1:] for row in AGAINST], ids=[row[0] for row in AGAINST])
def test_parameters_that_the_teacher_does_not_fit_are_refused(base, cache, monkeypatch, params, words):
    monkeypatch.setattr(checks, "check_judges", lambda *_: None)
    found = with_params(base, parsed_lists(params))
    models = checks.TypeExtractor(dict(pipelines)).extract_types_from_pipelines()
    values = found["parameters"]
    typed = {key: model.model_validate(config_loader.lookup(values, key.split("."))) for key, model in models.items()}
    catalog = DataCatalog({f"params:{key}": MemoryDataset(value, copy_mode="assign") for key, value in typed.items()})
    names = ("ablation",) if params.startswith("ablation") else ("tscd", "dmd")
    sentence = told(lambda: checks.check_models(sum((pipelines[name] for name in names), Pipeline([])), catalog))
    assert all(word in sentence for word in words), sentence


def test_steps_beyond_the_teacher_s_timesteps_are_refused():
    evaluation = EvaluationConfig(samples=4, unseen_samples=4, teacher_steps=(50,))
    evaluation.check(1000)
    assert "teacher_steps" in told(lambda: evaluation.check(20))


def test_every_environment_of_the_project_is_good():
    for env in sorted(path.name for path in (ROOT / "conf").iterdir() if path.is_dir() and path.name not in ("local", "base")):
        found = loader(ROOT / "conf", env=env)
        checks.check_parameters(found, ROOT)
        checks.check_catalog(found)
        checks.check_tracking(found)
        TeacherConfig(**found["parameters"]["teacher"])


# --- through the command line ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("conf/local/parameters.yml", "tscd_k2:\n\tstage: {}\n", ["conf/local/parameters.yml: line 2", "no YAML"]),
        ("conf/local/catalog.yml", "a: {b: '${nothing}'}\n", ["conf/local/catalog.yml: line 1", "${nothing}"]),
        ("conf/local/mlflow.yml", "server: {uri: x}\n", ["conf/local/mlflow.yml: line 1", "server.uri"]),
        ("conf/local/parameters.yml", "tscd_k3: {stage: {segments: 2}}\n", ["conf/local/parameters.yml", "tscd_k3", "did you mean"]),
    ],
)
def test_the_command_line_prints_one_line(small_project, kedro, file, content, words):
    (small_project / file).write_text(content)
    before = (small_project / "mlflow.db").read_bytes()
    done = kedro(small_project, "run")
    assert done.returncode == 1 and "Traceback" not in done.stderr + done.stdout, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert all(word in line for word in words), line
    assert (small_project / "mlflow.db").read_bytes() == before
