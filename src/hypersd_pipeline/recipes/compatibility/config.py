"""What the compatibility report combines the LoRA with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from hypersd_pipeline.config import Count, Share, Steps, Strict, Weight
from hypersd_pipeline.data.openmoji import font_file
from hypersd_pipeline.data.twemoji import SIZE, TwemojiConfig
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.metrics.edges import Detector, check_opencv
from hypersd_pipeline.models.controlnet import find_controlnet
from hypersd_pipeline.models.teacher import Teacher, TeacherConfig
from hypersd_pipeline.models.teacher_check import check_teacher
from hypersd_pipeline.models.user_lora import user_lora_file
from hypersd_pipeline.training.config import LoraShape
from hypersd_pipeline.training.loop import LoopConfig

Name = Annotated[str, Field(pattern="^[A-Za-z0-9][A-Za-z0-9_-]*$")]
"""Of an entry. It becomes part of the names of folders, rows and metrics."""
KEY = "compatibility"


class PartConfig(Strict):
    """What every entry has: a source of the user's own, or a training.

    Attributes:
        source: a folder in diffusers layout, or a hub id. A style LoRA may also be a file. With a source nothing is trained.
        train: how it is trained for the teacher, where there is no source.
    """

    source: str | None = None
    train: LoopConfig | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> PartConfig:
        if self.source is None and self.train is None:
            raise ValueError("it has neither source nor train; give one, or set the entry to null")
        return self

    @property
    def loop(self) -> LoopConfig | None:
        """Of its training. None where nothing is trained."""
        return self.train if self.source is None else None


class ControlConfig(PartConfig):
    """A ControlNet.

    Attributes:
        detector: how its conditions are made of images, see `metrics.edges`.
        scales: the ``controlnet_conditioning_scale`` of the rows.
    """

    detector: Detector
    scales: tuple[Weight, ...] = Field(default=(1.0,), min_length=1)


class BaseConfig(PartConfig):
    """Another base model of the teacher's family. Trained here, it is the teacher, fine-tuned on OpenMoji's style.

    Attributes:
        variant: see `TeacherConfig`.
    """

    variant: str | None = None


class StyleConfig(PartConfig):
    """A style LoRA. Trained here, it learns OpenMoji's style.

    Attributes:
        lora: its shape, where it is trained here.
        weights: of the style LoRA beside the few-step LoRA, which keeps its weight of 1.
    """

    lora: LoraShape | None = None
    weights: tuple[Weight, ...] = Field(default=(0.5, 1.0), min_length=1)

    @model_validator(mode="after")
    def _has_a_shape(self) -> StyleConfig:
        if self.loop is not None and self.lora is None:
            raise ValueError("a style LoRA that is trained needs its shape; add lora with rank and target_modules")
        return self


class CompatibilityConfig(Strict):
    """The compatibility report. An entry that is null is left out.

    Attributes:
        controlnets, bases, styles: what the LoRA is combined with, by name.
        steps: of the few-step LoRA. teacher_steps: of the models without it, which have the evaluation's guidance scale.
        prompts: rows of the split test, whose images give the conditions.
        tolerance: pixels by which an edge may be off.
        scenes: of the data set in OpenMoji's style.
        caption_dropout: share of the rows that are trained without their caption, since the teacher's rows are guided.
    """

    controlnets: dict[Name, ControlConfig | None]
    bases: dict[Name, BaseConfig | None]
    styles: dict[Name, StyleConfig | None]
    steps: tuple[Steps, ...] = Field(default=(1, 2, 4, 8), min_length=1)
    teacher_steps: Steps = 25
    prompts: int = Field(default=64, ge=4, le=10**6)
    tolerance: Count = 1
    scenes: TwemojiConfig = TwemojiConfig()
    caption_dropout: Share = 0.1

    def active_controlnets(self) -> dict[str, ControlConfig]:
        """Those that are not null."""
        return {name: entry for name, entry in self.controlnets.items() if entry is not None}

    def active_bases(self) -> dict[str, BaseConfig]:
        """Those that are not null."""
        return {name: entry for name, entry in self.bases.items() if entry is not None}

    def active_styles(self) -> dict[str, StyleConfig]:
        """Those that are not null."""
        return {name: entry for name, entry in self.styles.items() if entry is not None}

    def in_style(self) -> Iterator[str]:
        """The keys of the entries that are trained on OpenMoji's style."""
        for kind, entries in (("bases", self.active_bases()), ("styles", self.active_styles())):
            yield from (f"{KEY}.{kind}.{name}" for name, entry in entries.items() if entry.loop is not None)

    def check(self, teacher: Teacher) -> None:
        """Check what can be told before anything is computed.

        Args:
            teacher: without any part loaded.

        Raises:
            UserError: a source is missing, is for another family, or a package is not installed.
        """
        for name, control in self.active_controlnets().items():
            check_opencv(f"{KEY}.controlnets.{name}")
            if control.source is not None:
                find_controlnet(control.source, f"{KEY}.controlnets.{name}")
        for name, base in self.active_bases().items():
            if base.source is not None:
                checked = checked_base(teacher.config, base, f"{KEY}.bases.{name}")
                for what in ("layout", "latent_shape"):
                    _same(what, getattr(checked, what), getattr(teacher, what), f"{KEY}.bases.{name}.source")
                _same("prediction_type", checked.process.prediction_type, teacher.process.prediction_type, f"{KEY}.bases.{name}.source")
        for name, style in self.active_styles().items():
            if style.source is not None:
                style_file(style.source, f"{KEY}.styles.{name}")
        for key in self.in_style():
            if teacher.resolution != SIZE:
                raise UserError(
                    f"{key}.train: the scenes in OpenMoji's style have {SIZE} pixels, but the teacher {teacher.resolution}; give a source."
                )
            font_file(key)


def _same(what: str, given: object, needed: object, key: str) -> None:
    if given != needed:
        raise UserError(f"{key}: its {what} is {given}, but the teacher's is {needed}; give a base of the teacher's family.")


def base_teacher(teacher: TeacherConfig, source: str, variant: str | None) -> TeacherConfig:
    """Another base, held as the teacher is."""
    own = {"source": source, "variant": variant, "revision": None, "layout": "auto", "prediction_type": "auto"}
    return teacher.model_copy(update=own)


def checked_base(teacher: TeacherConfig, base: BaseConfig, key: str) -> Teacher:
    """Another base's description, its folder checked whole.

    Raises:
        UserError: it is missing, damaged or of a kind that is not supported.
    """
    assert base.source is not None
    try:
        return check_teacher(base_teacher(teacher, base.source, base.variant)).teacher
    except UserError as error:
        raise UserError(f"{key}.{str(error).removeprefix('teacher.')}") from error


def style_file(source: str, key: str) -> Path:
    """A style LoRA's file. Raises UserError where there is none."""
    try:
        return user_lora_file(Path(source))
    except UserError as error:
        raise UserError(
            f"{key}.source{str(error).removeprefix('start')}".replace("or set start to null", "or set the entry to null")
        ) from error
