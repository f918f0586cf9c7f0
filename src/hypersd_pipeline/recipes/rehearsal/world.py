"""What a rehearsal runs on: a teacher with random weights, random images, random judges, and an environment that names them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from pydantic import Field, field_validator

from hypersd_pipeline.config import Count, Side, Strict
from hypersd_pipeline.data.config import CocoSource, DataConfig, TwemojiSource
from hypersd_pipeline.files import replacing_folder, write_text
from hypersd_pipeline.metrics.config import EvaluationConfig
from hypersd_pipeline.models.public import description, write_random_teacher
from hypersd_pipeline.models.teacher import Dtype, TeacherConfig
from hypersd_pipeline.recipes.rehearsal.judges import RandomJudges, Values
from hypersd_pipeline.rewards import RewardConfig
from hypersd_pipeline.training.config import FeedbackConfig, StageConfig, changed
from hypersd_pipeline.training.terms import AdversarialConfig, MatchingConfig, PerceptualConfig, RegressionConfig, RewardTermConfig

SPLITS = {"train": 12, "val": 4, "test": 6}
"""Images of each split."""
BATCH = 2
"""Images that are evaluated at a time."""
WORDS = ("a red apple", "two cats on a sofa", "a green tree", "a house by the sea")


class RehearsalConfig(Strict):
    """How large a rehearsal is. All else is the environment's.

    Attributes:
        environment: whose stages are rehearsed. conf: the folder of all environments. Both are known to the configuration's loader.
        resolution: of the images. A teacher that is shipped keeps its own.
        updates: of each stage. batch: images of a pass. An update has two passes, so that gradients are accumulated.
        dtype: of the teacher's network, where the machine cannot hold the environment's own. None: the environment's.
        leave_out: kinds of rewards that the evaluation is rehearsed without. PickScore and HPSv2 take 4 GB each, and the feedback stage
            rehearses PickScore as its held-out reward.
        unet_rewards: rehearse the one-step UNet with its rewards too. The unified LoRA rehearses them anyway, and three networks with the
            gradients of one need the memory.
        only: parts of the job, or how their names begin, as a list or with spaces between. What is not named counts as done before. None:
            all.
        keep: keep the random weights and what was trained on them.
    """

    environment: str
    conf: Path
    resolution: Side = 64
    updates: Count = 2
    batch: Count = 1
    dtype: Dtype | None = None
    leave_out: tuple[str, ...] = Field(default=("pick_score", "hps_v2"))
    unet_rewards: bool = False
    only: tuple[str, ...] | None = None
    keep: bool = False

    @field_validator("only", mode="before")
    @classmethod
    def _split(cls, only: object) -> object:
        return only.split() if isinstance(only, str) else only


@dataclass(frozen=True)
class Environment:
    """The sections of the environment that is rehearsed, and each stage by its key, such as ``tscd_k8``."""

    teacher: TeacherConfig
    data: DataConfig
    evaluation: EvaluationConfig
    stages: Mapping[str, StageConfig]


@dataclass(frozen=True)
class World:
    """Where a rehearsal takes place.

    Attributes:
        folder: that of its environment. conf: with the environment ``name``.
        teacher, stages: as they are rehearsed.
    """

    name: str
    folder: Path
    conf: Path
    teacher: TeacherConfig
    stages: Mapping[str, StageConfig]


def make_world(config: RehearsalConfig, environment: Environment) -> World:
    """Write what is missing of it, and its environment.

    Raises:
        UserError: the architecture of the teacher is not known.
    """
    own = config.environment not in ("base", "local")
    name = f"{config.environment}_rehearsal" if own else "rehearsal"
    folder = Path("data") / name
    raw = folder / "01_raw"
    told = None if environment.teacher.source == "shipped" else description(environment.teacher)
    if told is not None and not (raw / "teacher").exists():
        with replacing_folder(raw / "teacher") as teacher:
            write_random_teacher(teacher, told, environment.teacher.variant)
    values = overrides(config, environment, raw)
    conf = folder / "conf"
    shutil.rmtree(conf, ignore_errors=True)
    shutil.copytree(config.conf, conf, ignore=shutil.ignore_patterns("local", "*credentials*"))
    (conf / "local").mkdir()
    extends = {"extends": config.environment} if own else {}
    (conf / name).mkdir()
    write_text(conf / name / "parameters.yml", yaml.safe_dump({**extends, **values}, sort_keys=False))
    rehearsed = changed(environment.teacher, **values.get("teacher", {}))
    return World(name, folder, conf, rehearsed, {key: changed(stage, **values[key]["stage"]) for key, stage in environment.stages.items()})


def overrides(config: RehearsalConfig, environment: Environment, raw: Path) -> Values:
    """What the rehearsal's environment overrides: sizes, and the files that are made up."""
    judges = RandomJudges(raw / "judges")
    teacher: Values = {"dtype": config.dtype} if config.dtype else {}
    if environment.teacher.source != "shipped":
        teacher |= {"source": str((raw / "teacher").absolute()), "revision": None, "resolution": config.resolution}
    return {
        "plan": {"refuse": False},  # the rehearsal itself asks for free memory
        **({"teacher": teacher} if teacher else {}),
        "data": {**_data(environment.data, raw / "images", config.resolution), "batch_size": 2, "workers": 1},
        "evaluation": _evaluation(environment.evaluation, config.leave_out, judges),
        **{key: {"stage": _stage(key, stage, config, judges)} for key, stage in environment.stages.items()},
    }


def _without_rewards(stage: StageConfig) -> Values:
    return {name: None for name, term in stage.active().items() if isinstance(term, RewardTermConfig)}


def _stage(key: str, stage: StageConfig, config: RehearsalConfig, judges: RandomJudges) -> Values:
    loop = {"steps": config.updates, "batch_size": 2 * config.batch, "accumulate": 2, "log_every": 1, "checkpoint_every": config.updates}
    values: Values = {"loop": loop, "terms": {}}
    for name, term in stage.active().items():
        changed: Values = {"batch": config.batch} if getattr(term, "batch", None) is not None else {}
        match term:
            case MatchingConfig():
                changed["critic"] = {"updates": min(term.critic.updates, 2), "warmup_updates": min(term.critic.warmup_updates, 1)}
            case AdversarialConfig() if term.warmup_updates:
                changed["warmup_updates"] = 1
            case RegressionConfig():
                changed["pairs"] = {"count": 2, "steps": min(term.pairs.steps, 2), "batch_size": config.batch}
            case RewardTermConfig():
                changed["reward"] = judges.reward(term.reward)
            case PerceptualConfig():
                changed["model"] = judges.perceptual(term.model)
        values["terms"][name] = {key: value for key, value in changed.items() if value != {}}
    values["terms"] = {name: changed for name, changed in values["terms"].items() if changed}
    if key == "one_step_unet" and not config.unet_rewards:
        values["terms"] |= _without_rewards(stage)
    if isinstance(stage, FeedbackConfig):
        values |= {"guard": {"every": config.updates, "prompts": 2, "variants": 2}, "merge_weights": [1.0], "test_images": 2}
        if held_out := judges.reward(stage.held_out):
            values["held_out"] = held_out
        silent = {name: term for name, term in stage.terms.items() if isinstance(term, PerceptualConfig) and not term.weight}
        values["terms"] |= {name: {"model": model} for name, term in silent.items() if (model := judges.perceptual(term.model))}
    return values


def _evaluation(evaluation: EvaluationConfig, leave_out: Iterable[str], judges: RandomJudges) -> Values:
    values: Values = {
        "samples": 4, "unseen_samples": 4, "batch_size": BATCH, "student_steps": [1, 4], "teacher_steps": [1, 4], "bootstrap": 100,
        "grid_prompts": 2,
    }  # fmt: skip
    for name, section in (("features", judges.features(evaluation.features)), ("clip", judges.clip(evaluation.clip))):
        if section:
            values[name] = section
    rewards = [reward for reward in evaluation.rewards if reward.kind not in leave_out]
    if rewards or evaluation.rewards:
        values["rewards"] = [_whole(reward, judges) for reward in rewards]
    return values


def _whole(reward: RewardConfig, judges: RandomJudges) -> Values:
    """A list is overridden as a whole, so a reward in it is written with all that it has."""
    return {**reward.model_dump(mode="json", exclude_defaults=True), "kind": reward.kind, **judges.reward(reward)}


def _data(data: DataConfig, root: Path, side: int) -> Values:
    """Random images in COCO's format, or as a folder where the environment's data have no instance masks."""
    if isinstance(data.source, TwemojiSource):
        return {"source": {"train": 16, "val": 8, "test": 8, "test_unseen": 8}}
    if not root.exists():
        with replacing_folder(root) as folder:
            _write_coco(folder, side + side // 2)
    splits = {name: {"of": name, "share": [0.0, 1.0]} for name in SPLITS}
    layout = {"captions": "annotations/captions_{split}.json", "instances": "annotations/instances_{split}.json", "images": "{split}"}
    if isinstance(data.source, CocoSource):
        return {"source": {"root": str(root.absolute()), **layout, "splits": splits}}
    # keys of another kind of source would stay behind: each is set to null, which removes the section
    return {"source": {"kind": "folder", "root": str(root.absolute()), "captions": None, "splits": splits}}


def _write_coco(root: Path, side: int) -> None:
    """Random images with a caption file beside each, COCO's annotations of them, and one instance each."""
    rng, number = np.random.default_rng(0), 0
    (root / "annotations").mkdir(parents=True)
    for split, count in SPLITS.items():
        (root / split).mkdir()
        images: list[dict[str, Any]] = []
        for i in range(count):
            number += 1
            name = f"{number:012d}.png"
            Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(root / split / name)
            write_text(root / split / f"{number:012d}.txt", WORDS[i % len(WORDS)])
            images.append({"id": number, "file_name": name, "width": side, "height": side})
        low, high = side // 4, 3 * side // 4
        box = [low, low, high, low, high, high, low, high]
        captions = [{"id": i["id"], "image_id": i["id"], "caption": WORDS[i["id"] % len(WORDS)]} for i in images]
        instances = [
            {"id": i["id"], "image_id": i["id"], "category_id": 1, "iscrowd": 0, "segmentation": [box], "area": float((high - low) ** 2),
             "bbox": [low, low, high - low, high - low]}
            for i in images
        ]  # fmt: skip
        for kind, listed in (("captions", captions), ("instances", instances)):
            content = {"images": images, "annotations": listed, "categories": [{"id": 1, "name": "person"}]}
            write_text(root / "annotations" / f"{kind}_{split}.json", json.dumps(content))
