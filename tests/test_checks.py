"""What is wrong in ``conf/`` is one sentence with the file, the key as the user wrote it, and the cure."""

import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from kedro.io import DataCatalog, MemoryDataset
from kedro.pipeline import Pipeline
from stages import LOOP, LORA

from hypersd_pipeline import checks
from hypersd_pipeline.config_loader import ProjectConfigLoader
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.pipelines import (
    ablation,
    arena,
    baselines,
    compare,
    compatibility,
    data_prep,
    dmd,
    export,
    feedback,
    one_step_unet,
    plan,
    rehearsal,
    replicates,
    retrain,
    reward_models,
    segmentation_model,
    teacher,
    tscd,
    unified_sampling,
)
from hypersd_pipeline.settings import CONFIG_LOADER_ARGS
from hypersd_pipeline.training.config import StageConfig

CONF = Path(__file__).parents[1] / "conf"
MINE = "conf/mine/parameters.yml: "
PIPELINES = {module.__name__.rsplit(".", 1)[1]: module.create_pipeline() for module in (tscd, dmd, baselines, ablation, replicates)}
OTHERS = {
    module.__name__: module.create_pipeline()
    for module in (
        arena, compare, compatibility, export, one_step_unet, plan, rehearsal, retrain, reward_models, segmentation_model, teacher,
        unified_sampling,
    )
}  # fmt: skip
PIPELINES["feedback"] = data_prep.create_pipeline() + feedback.create_pipeline()


def conf_with(tmp_path: Path, text: str) -> Path:
    """A copy of conf/ with an environment ``mine``."""
    shutil.copytree(CONF, tmp_path / "conf", ignore=shutil.ignore_patterns("smoke", "sd15", "sdxl"))
    (tmp_path / "conf/mine").mkdir()
    (tmp_path / "conf/mine/parameters.yml").write_text(text)
    return tmp_path / "conf"


def check(conf: Path, monkeypatch: pytest.MonkeyPatch, pipeline: Pipeline, params: dict[str, Any] | None = None) -> None:
    """What `kedro run --env mine --pipelines ...` does before anything runs."""
    monkeypatch.setattr(checks, "pipelines", {"asked": pipeline})
    monkeypatch.setattr(checks, "_all_pipelines", lambda: nullcontext({**PIPELINES, **OTHERS}))
    loader = ProjectConfigLoader(str(conf), env="mine", runtime_params=params, **CONFIG_LOADER_ARGS)
    checks.check_parameters(loader, conf.parent)


@pytest.mark.parametrize("name", PIPELINES)
def test_what_the_project_ships_is_accepted(tmp_path, monkeypatch, name):
    check(conf_with(tmp_path, "{}"), monkeypatch, PIPELINES[name])


TERMS = "consistency, matching, regression, reward, anchor, perceptual, adversarial"
QUOTED = ", ".join(f"'{term}'" for term in TERMS.split(", "))
REWARDS = "'laion_aesthetic', 'image_reward', 'pick_score', 'hps_v2', 'shipped_quality', 'text_image'"
GRID = "50 is no multiple of segments: 4, so that the solver would miss their boundaries; use a multiple, such as 20."
NONE_LEFT = "terms: all that could train the student have weight 0 or are missing; set one of them."
FIRST = "previous_stage needs a stage before this one; use base for the first stage."
NO_MASKS = "a data source of kind 'folder' has no instance masks; set it to null or use kind 'coco'."


@pytest.mark.parametrize(
    ("pipeline", "text", "told"),
    [
        # an unknown key: in a term that its name tells, in one that says its kind, and deeper
        (
            "tscd",
            "tscd_k4: {stage: {terms: {consistency: {guidanc: [3, 5]}}}}",
            f"{MINE}tscd_k4.stage.terms.consistency.guidanc: unknown key; did you mean 'guidance'?",
        ),
        (
            "tscd",
            "tscd: {terms: {consistency: {guidanc: 3}}}",
            f"{MINE}tscd_k8.stage.terms.consistency.guidanc: unknown key; did you mean 'guidance'?",
        ),
        (
            "feedback",
            "feedback: {stage: {terms: {quality: {alfa: 3}}}}",
            f"{MINE}feedback.stage.terms.quality.alfa: unknown key; did you mean 'alpha'?",
        ),
        (
            "feedback",
            "feedback: {stage: {terms: {reward: {alfa: 3, alpha: 2, reward: {kind: shipped_quality}}}}}",
            f"{MINE}feedback.stage.terms.reward.alfa: unknown key; did you mean 'alpha'?",
        ),
        (
            "feedback",
            "feedback: {stage: {terms: {quality: {reward: {size: 3}}}}}",
            f"{MINE}feedback.stage.terms.quality.reward.size: unknown key; remove it, or use one of kind.",
        ),
        (
            "feedback",
            "feedback: {stage: {terms: {perceptual: {model: {wights: x}}}}}",
            f"{MINE}feedback.stage.terms.perceptual.model.wights: unknown key; did you mean 'weights'?",
        ),
        (
            "feedback",
            "feedback: {stage: {held_out: {wights: x}}}",
            f"{MINE}feedback.stage.held_out.wights: unknown key; did you mean 'weights'?",
        ),
        (
            "dmd",
            "dmd: {stage: {terms: {regression: {pairs: {cont: 2}}}}}",
            f"{MINE}dmd.stage.terms.regression.pairs.cont: unknown key; did you mean 'count'?",
        ),
        ("dmd", "dmd: {stage: {sample: {timestap: 2}}}", f"{MINE}dmd.stage.sample.timestap: unknown key; did you mean 'timestep'?"),
        ("tscd", "tscd: {loop: {step: 2}}", f"{MINE}tscd_k8.stage.loop.step: unknown key; did you mean 'steps'?"),
        (
            "replicates",
            "replicates: {chain: {unified: {ema: 1}}}",
            f"{MINE}replicates.chain.unified.ema: unknown key; remove it, or use one of",
        ),
        (
            "ablation",
            "ablation: {baselines: {PCM: {pcm: {terms: {consistency: {guidanc: 2}}}}}}",
            f"{MINE}ablation.baselines.PCM.pcm.terms.consistency.guidanc: unknown key; did you mean 'guidance'?",
        ),
        ("data", "data: {source: {trains: 3}}", f"{MINE}data.source.trains: unknown key; did you mean 'train'?"),
        # a missing key
        (
            "feedback",
            "feedback: {stage: {terms: {mine: {kind: reward, reward: {kind: shipped_quality}}}}}",
            f"{MINE}feedback.stage.terms.mine.alpha: is missing; add it.",
        ),
        # kinds
        (
            "tscd",
            "tscd_k4: {stage: {terms: {mine: {weight: 1}}}}",
            f"{MINE}tscd_k4.stage.terms: terms.mine needs a kind; choose one of {TERMS}.",
        ),
        (
            "tscd",
            "tscd_k4: {stage: {terms: {consistancy: {weight: 1}}}}",
            f"{MINE}tscd_k4.stage.terms: terms.consistancy needs a kind; choose one of {TERMS}.",
        ),
        (
            "tscd",
            "tscd_k4: {stage: {terms: {mine: {kind: consistancy}}}}",
            f"{MINE}tscd_k4.stage.terms.mine.kind: there is no kind 'consistancy'; choose one of {QUOTED}.",
        ),
        (
            "feedback",
            "feedback: {stage: {terms: {quality: {reward: {kind: shiped}}}}}",
            f"{MINE}feedback.stage.terms.quality.reward.kind: there is no kind 'shiped'; choose one of {REWARDS}.",
        ),
        (
            "feedback",
            "feedback: {stage: {terms: {mine: {kind: reward, reward: {size: 3}, alpha: 1}}}}",
            f"{MINE}feedback.stage.terms.mine.reward.kind: it is missing; say which kind this section is.",
        ),
        ("data", "data: {source: {kind: foldr}}", f"{MINE}data.source.kind: there is no kind 'foldr'; choose one of"),
        # values
        (
            "dmd",
            "dmd: {stage: {terms: {matching: {weight: -1}}}}",
            f"{MINE}dmd.stage.terms.matching.weight: input should be greater than or equal to 0 (it is -1).",
        ),
        (
            "tscd",
            "tscd_k4: {stage: {terms: {adversarial: {hidden: 33}}}}",
            f"{MINE}tscd_k4.stage.terms.adversarial.hidden: hidden is 33, not a multiple of 32, the groups of its",
        ),
        ("tscd", "tscd_k4: {stage: {terms: 5}}", f"{MINE}tscd_k4.stage.terms: terms is no list of terms but 5 (it is 5)."),
        ("dmd", "dmd: {stage: {sample: {steps: 4}}}", f"{MINE}dmd.stage.sample: timestep is for one step only, and steps is 4."),
        (
            "dmd",
            "dmd: {stage: {terms: {consistency: {teacher: previous_stage}}}}",
            f"{MINE}dmd.stage: terms.consistency.teacher: a one-step stage has no previous stage's LoRA beside its own; use base.",
        ),
        # what belongs together
        ("tscd", "tscd_k4: {stage: {terms: {consistency: {weight: 0}}}}", f"{MINE}tscd_k4.stage: {NONE_LEFT}"),
        ("tscd", "tscd_k4: {stage: {terms: {consistency: null}}}", f"{MINE}tscd_k4.stage: {NONE_LEFT}"),
        (
            "tscd",
            "tscd_k4: {stage: {terms: {consistency: {solver_points: 50}}}}",
            f"{MINE}tscd_k4.stage.terms.consistency.solver_points: {GRID}",
        ),
        (
            "replicates",
            "tscd_k4: {stage: {terms: {consistency: {solver_points: 50}}}}",
            f"{MINE}replicates.chain.k4.terms.consistency.solver_points: {GRID}",
        ),
        (
            "tscd",
            "tscd: {terms: {consistency: {teacher: previous_stage}}}",
            f"{MINE}tscd_k8.stage.terms.consistency.teacher: {FIRST}",
        ),
        ("feedback", "data: {source: {kind: folder, root: /images}}", f"feedback.stage.terms.perceptual: {NO_MASKS}"),
        (
            "feedback",  # its mask AP would still be measured, after the training
            "data: {source: {kind: folder, root: /images}}\nfeedback: {stage: {terms: {perceptual: {weight: 0}}}}",
            f"feedback.stage.terms.perceptual: {NO_MASKS}",
        ),
        (
            "feedback",
            "data: {source: {kind: shards, root: /tars}}",
            f"feedback.stage.terms.perceptual: {NO_MASKS}".replace("folder", "shards"),
        ),
        (
            "replicates",
            "data: {source: {kind: prompts, file: /prompts.txt}}",
            "replicates.chain.k8.terms.consistency: a data source of kind 'prompts' has no images; set the term to null or "
            "use another kind.",
        ),
        ("replicates", "data: {source: {kind: folder, root: /images}}", f"replicates.chain.feedback.terms.perceptual: {NO_MASKS}"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, pipeline, text, told):
    with pytest.raises(UserError) as refusal:
        check(conf_with(tmp_path, text), monkeypatch, PIPELINES["feedback" if pipeline == "data" else pipeline])
    sentence = str(refusal.value)
    assert sentence.startswith(told) and sentence[-1] in ".?" and "\n" not in sentence, sentence


def test_only_keys_of_the_stage_s_own_kind_are_offered(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="ema_on_cpu") as refusal:
        check(conf_with(tmp_path, "replicates: {chain: {unified: {ema: 1}}}"), monkeypatch, PIPELINES["replicates"])
    assert "held_out" not in str(refusal.value)


def test_the_file_is_the_one_that_sets_the_key(tmp_path, monkeypatch):
    conf = conf_with(tmp_path, "{}")
    with pytest.raises(UserError, match=r"^--params: tscd_k4\.stage\.terms\.consistency\.guidanc: unknown key"):
        check(conf, monkeypatch, PIPELINES["tscd"], {"tscd_k4": {"stage": {"terms": {"consistency": {"guidanc": 3}}}}})
    file = conf / "base/parameters_tscd.yml"
    file.write_text(file.read_text().replace("segments: 4", "segments: 3"))
    with pytest.raises(UserError, match=r"^conf/base/parameters_tscd\.yml: tscd_k4\.stage\.terms\.consistency\.segments: input should be"):
        check(conf, monkeypatch, PIPELINES["tscd"])


def test_data_without_masks_is_accepted_where_nothing_asks_for_them(tmp_path, monkeypatch):
    text = "data: {source: {kind: folder, root: /images}}\nfeedback: {stage: {terms: {perceptual: null}}}"
    check(conf_with(tmp_path, text), monkeypatch, PIPELINES["feedback"])


@pytest.mark.parametrize(
    ("stage", "over", "told"),
    [
        ("tscd.tscd_k8", {"start": "mine"}, None),
        ("tscd.tscd_k8", {"start": "none"}, "tscd_k8.stage.start: there is no file or folder"),
        (
            "tscd.tscd_k4",
            {"start": "mine"},
            "tscd_k4.stage.start: this stage starts from lora_k8; set start for the first one only, such as tscd_k8.stage",
        ),
        (
            "tscd.tscd_k4",
            {"terms": {"consistency": {"segments": 4, "solver_points": 8, "guidance": [3, 8], "teacher": "previous_stage"}}},
            None,
        ),
        *(
            (
                f"baselines.baseline_{name}",
                {"terms": {"consistency": {"segments": segments, "solver_points": 8, "guidance": [3, 8], "teacher": "previous_stage"}}},
                f"baseline_{name}.stage.terms.consistency.teacher (segments: {segments}): previous_stage needs a stage before this one",
            )
            for name, segments in (("lcm", 1), ("tcd", 1), ("pcm", 4))
        ),
    ],
)
def test_what_a_stage_starts_from_is_checked_before_anything_is_trained(tmp_path, stage, over, told):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "my_lora.safetensors").touch()
    made, _, name = stage.partition(".")
    pipeline = {"tscd": tscd, "baselines": baselines}[made].create_pipeline()
    catalog = DataCatalog({name: MemoryDataset(None) for name in pipeline.inputs()})
    given = {
        "terms": {"consistency": {"segments": 8 if name == "tscd_k8" else 4, "solver_points": 40, "guidance": [3, 8]}},
        "lora": LORA,
        "loop": LOOP,
        **over,
    }
    if "start" in given:
        given["start"] = tmp_path / given["start"]
    catalog[f"params:{name}.stage"] = MemoryDataset(StageConfig.model_validate(given), copy_mode="assign")
    if told is None:
        checks.check_starts(pipeline, catalog)
    else:
        with pytest.raises(UserError, match=f"^{re.escape(told)}"):
            checks.check_starts(pipeline, catalog)
