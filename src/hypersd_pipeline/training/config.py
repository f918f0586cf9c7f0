"""The configuration of a stage: a list of weighted terms, and how the student is trained on them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, Field, field_validator, model_validator

from hypersd_pipeline.config import Count, Decay, Share, Strict, Timestep, Weight, Width, for_key
from hypersd_pipeline.data.trajectories import NoisePairsConfig
from hypersd_pipeline.diffusion.grids import check_grid
from hypersd_pipeline.diffusion.process import Process
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.files import same_content
from hypersd_pipeline.rewards import RewardConfig
from hypersd_pipeline.training.guard import GuardConfig
from hypersd_pipeline.training.loop import LoopConfig
from hypersd_pipeline.training.rollouts import SampleConfig
from hypersd_pipeline.training.terms import (
    AdversarialConfig,
    AnyTerm,
    ConsistencyConfig,
    PerceptualConfig,
    RegressionConfig,
    RewardTermConfig,
    TermConfig,
)
from hypersd_pipeline.training.terms.base import Place

Model = TypeVar("Model", bound=BaseModel)

ORDER: tuple[type[TermConfig], ...] = get_args(get_args(AnyTerm)[0])
"""The order in which terms are taken, whatever the order in the configuration is."""

PACKAGED = "src/hypersd_pipeline/assets/judges/"
"""Where the judges of the embedded default lie."""

MergeWeight = Annotated[float, Field(gt=0, le=100)]
"""Of the feedback LoRA in a merged one."""

KINDS = tuple(term.model_fields["kind"].default for term in ORDER)


class LoraShape(Strict):
    """Where the LoRA sits.

    Attributes:
        rank: of every pair. alpha equals it.
        target_modules: module-name endings.
    """

    rank: Width
    target_modules: tuple[Annotated[str, Field(min_length=1)], ...] = Field(min_length=1)


class SamplingConfig(Strict):
    """How the finished LoRA is to be sampled, as far as the user chooses.

    Attributes:
        eta: TCDScheduler's; 0 is DDIM, 1 is LCM's sampling.
        one_step_timestep: the timestep that one step is told, where it is not T - 1.
    """

    eta: Share = 0.0
    one_step_timestep: Timestep | None = None


class StageConfig(Strict):
    """A stage of training.

    Attributes:
        terms: name -> term. A term whose name is its kind need not say its ``kind``. ``null`` and a weight of 0 switch a term off.
            A list of terms is taken too. Its terms are named by their kinds.
        sample: how the student samples what matching, regression, rewards and anchor judge.
        ema_decay: mu of the averaged student, which is the target network and what is exported.
        gradient_checkpointing, decode_checkpointing: memory for time.
        sampling: of the sampling contract.
        lora: of the student.
        start: a LoRA of the user's own from which a first stage starts, a ``.safetensors`` or its folder (see `read_user_lora`).
    """

    terms: dict[str, AnyTerm]
    sample: SampleConfig = SampleConfig()
    ema_decay: Decay = 0.95
    gradient_checkpointing: bool = False
    decode_checkpointing: bool = False
    sampling: SamplingConfig = SamplingConfig()
    lora: LoraShape
    start: Path | None = None
    loop: LoopConfig

    @field_validator("terms", mode="before")
    @classmethod
    def _named(cls, terms: Any) -> Any:
        if isinstance(terms, list | tuple):
            terms = _names(terms)
        if not isinstance(terms, Mapping):
            raise ValueError(f"terms is no list of terms but {terms!r}")
        return {name: _with_kind(name, term) for name, term in terms.items() if term is not None}

    @model_validator(mode="after")
    def _sensible(self) -> StageConfig:
        active = self.active()
        if self.loop.compile and self.gradient_checkpointing:
            raise ValueError("loop.compile does not go with gradient_checkpointing; switch one of them off")
        if not any(isinstance(term, TRAINING) for term in active.values()):
            raise ValueError("terms: all that could train the student have weight 0 or are missing; set one of them")
        for kind in ORDER:
            if kind is not RewardTermConfig and sum(isinstance(term, kind) for term in active.values()) > 1:
                raise ValueError(f"terms: {kind.model_fields['kind'].default} stands there twice; a stage has one of it")
        if self.consistency is None and any(self.place_of(term) == "trajectory" for term in active.values()):
            raise ValueError("terms: the trajectory, on which a term judges, is the consistency term's; add one with a weight above 0")
        judge = self.adversarial
        if judge is not None and self.consistency is not None and self.consistency.target == "tangent":
            raise ValueError("terms.adversarial: a tangent is no sample that a discriminator could take for real; switch one of them off")
        if judge is not None and self.place_of(judge) == "sample":
            if judge.pair:
                raise ValueError("terms.adversarial.pair: a sample has no second point to be judged with; use false")
            if judge.encoder == "adapter":
                raise ValueError("terms.adversarial.encoder: samples are judged by the frozen encoder only; use frozen")
        return self

    def active(self) -> dict[str, TermConfig]:
        """The terms with a weight, in the order of `ORDER`."""
        found = [(name, term) for kind in ORDER for name, term in self.terms.items() if type(term) is kind and term.weight]
        return dict(found)

    def one(self, kind: type[Model]) -> Model | None:
        """The active term of a kind, or None."""
        return next((term for term in self.active().values() if isinstance(term, kind)), None)

    @property
    def consistency(self) -> ConsistencyConfig | None:
        """The active consistency term."""
        return self.one(ConsistencyConfig)

    @property
    def adversarial(self) -> AdversarialConfig | None:
        """The active adversarial term."""
        return self.one(AdversarialConfig)

    def place_of(self, term: TermConfig) -> Place:
        """Which prediction a term judges. The adversarial term judges the trajectory where no other term judges samples."""
        if not isinstance(term, AdversarialConfig):
            return term.place
        others = [other.place for other in self.active().values() if not isinstance(other, AdversarialConfig)]
        return "trajectory" if "trajectory" in others and "sample" not in others else "sample"

    def judge_files(self) -> list[Path]:
        """The weights of all judges, found, fetched and checked.

        Raises:
            UserError: one is missing or has another sha256.
        """
        return [path for term in self.active().values() for path in term.files()]

    def check_judges(self) -> None:
        """Raises UserError for a judge that is missing, damaged or of another network. The sentence begins with the term's name."""
        for name, term in self.active().items():
            try:
                term.check()
            except UserError as error:
                raise UserError(f"terms.{name}: {error}") from error

    def identity(self) -> dict[str, Any]:
        """What the trained weights depend on, of the configuration: memory and sampling may change."""
        free = {"terms", "loop", "sampling", "gradient_checkpointing", "decode_checkpointing"}
        terms = {name: for_key(term) for name, term in self.active().items()}
        values = {name: value for name, value in for_key(self).items() if name not in free}
        return {**values, "terms": terms, "loop": self.loop.identity()}

    def check(self, process: Process) -> None:
        """Raises UserError for a timestep, a solver's point or a number of steps that the teacher's schedule does not have."""
        for key, told in (("sample.timestep", self.sample.timestep), ("sampling.one_step_timestep", self.sampling.one_step_timestep)):
            if told is not None and told > process.last_timestep:
                raise UserError(f"stage.{key} is {told}, but the teacher's timesteps end at {process.last_timestep}; lower it.")
        if self.sample.steps > process.num_train_timesteps:
            raise UserError(
                f"stage.sample.steps is {self.sample.steps}, but the teacher has {process.num_train_timesteps} timesteps; lower it."
            )
        if self.consistency is not None:
            try:
                check_grid(process.solver_grid(self.consistency.solver_points), process.boundaries(self.consistency.segments))
            except UserError as error:
                raise UserError(f"stage.terms.consistency.{error}") from error

    @property
    def needs_images(self) -> bool:
        """Whether any term asks for decoded images."""
        return any(term.needs_images for term in self.active().values())


class OneStepConfig(StageConfig):
    """A one-step stage.

    Attributes:
        feedback_weight: of the feedback LoRA in what the stage starts from.
        start_rank: of the LoRA that the stage starts from, by the closest weights of that rank. None: the sum of both ranks, of which those
            of the feedback LoRA can never learn in modules that it has not.
        ema_on_cpu: keep the averaged weights there (the UNet; saves a UNet of GPU memory).
        lora: of the student, where there is no LoRA that it starts from, and of the UNet's critic.
    """

    feedback_weight: Weight = 1.0
    start_rank: Width | None = None
    ema_on_cpu: bool = False

    @model_validator(mode="after")
    def _driven_by_the_base(self) -> OneStepConfig:
        if self.consistency is not None and self.consistency.teacher != "base":
            raise ValueError("terms.consistency.teacher: a one-step stage has no previous stage's LoRA beside its own; use base")
        return self

    @property
    def pairs(self) -> NoisePairsConfig | None:
        """The stored pairs of the regression term, or None where there is none."""
        regression = self.one(RegressionConfig)
        return None if regression is None else regression.pairs

    def identity(self) -> dict[str, Any]:
        """See `StageConfig`. The start has a hash of its own."""
        return {name: value for name, value in super().identity().items() if name not in ("feedback_weight", "start_rank", "ema_on_cpu")}


class FeedbackConfig(StageConfig):
    """Feedback learning (paper 3.2).

    Attributes:
        terms: anchor, rewards and the perceptual model. A perceptual term needs a data set with instance masks.
        held_out: the reward that is only reported, and watched by the guard.
        lora: of the feedback LoRA. loop.batch_size counts prompts.
        merge_weights: of the merged LoRAs that are written and measured.
        test_images: annotated test images on which the mask AP of generated images is taken.
    """

    held_out: RewardConfig
    guard: GuardConfig
    merge_weights: Annotated[tuple[MergeWeight, ...], Field(min_length=1)] = (0.5, 1.0)
    test_images: Count

    @field_validator("held_out", mode="before")
    @classmethod
    def _of_another_kind(cls, held_out: object) -> object:
        """An environment that names another kind overrides base, whose packaged weights stay behind. They are not meant."""
        if isinstance(held_out, dict) and held_out.get("kind") != "text_image" and str(held_out.get("weights", "")).startswith(PACKAGED):
            return {name: value for name, value in held_out.items() if name != "weights"}
        return held_out

    @field_validator("merge_weights")
    @classmethod
    def _named_by_two_digits(cls, weights: tuple[float, ...]) -> tuple[float, ...]:
        if len({f"{weight:.2f}" for weight in weights}) < len(weights):
            raise ValueError("merge_weights must differ in their first two decimals, which name the merged LoRAs")
        return weights

    @model_validator(mode="after")
    def _rewarded(self) -> FeedbackConfig:
        if not self.rewards:
            raise ValueError("terms: feedback needs at least one reward with a weight above 0")
        if any(term.reward == self.held_out for term in self.rewards):
            raise ValueError("held_out is one of the rewards that are trained on; name another reward, which only reports")
        perceptual = self.perceptual
        if perceptual is not None and perceptual.steps is not None and perceptual.steps > self.sample.steps:
            raise ValueError(f"terms.perceptual.steps is {perceptual.steps}, more than the {self.sample.steps} steps of the grid")
        return self

    @property
    def rewards(self) -> list[RewardTermConfig]:
        """The rewards that are trained on."""
        return [term for term in self.active().values() if isinstance(term, RewardTermConfig)]

    @property
    def perceptual(self) -> PerceptualConfig | None:
        """The active perceptual term."""
        return self.one(PerceptualConfig)

    @property
    def segmenter(self) -> PerceptualConfig | None:
        """The perceptual term whatever its weight is: with weight 0 the mask AP is measured too."""
        return next((term for term in self.terms.values() if isinstance(term, PerceptualConfig)), None)

    def judge_files(self) -> list[Path]:
        """See `StageConfig`. The held-out reward's too."""
        return [*super().judge_files(), *self.held_out.files()]

    def check_judges(self) -> None:
        """See `StageConfig`. The held-out reward must be none of those that are trained on."""
        super().check_judges()
        try:
            self.held_out.check()
        except UserError as error:
            raise UserError(f"held_out: {error}") from error
        segmenter = self.segmenter
        if segmenter is not None:
            segmenter.check()
        own = self.held_out.files()
        for name, term in self.active().items():
            if isinstance(term, RewardTermConfig) and type(term.reward) is type(self.held_out) and same_content(term.reward.files(), own):
                raise UserError(f"held_out: is the reward that terms.{name} trains on; name another one, which only reports.")

    def identity(self) -> dict[str, Any]:
        """See `StageConfig`. Merging and measuring come afterwards."""
        return {name: value for name, value in super().identity().items() if name not in ("merge_weights", "test_images")}


TRAINING = tuple(kind for kind in ORDER if kind.model_fields["kind"].default != "anchor")


def _with_kind(name: str, term: Any) -> Any:
    """A term's section with its ``kind``, which its name gives where it says none."""
    if isinstance(term, Mapping) and "kind" not in term:
        if name not in KINDS:
            raise ValueError(f"terms.{name} needs a kind; choose one of {', '.join(KINDS)}")
        return {"kind": name, **term}
    return term


def _names(terms: list[Any] | tuple[Any, ...]) -> dict[str, Any]:
    """A list of terms by name: the kind, and with a number from the second of a kind on."""
    named: dict[str, Any] = {}
    for term in (term for term in terms if term is not None):
        if not isinstance(term, Mapping | TermConfig):
            raise ValueError(f"terms: a list holds sections with a kind, not {term!r}")
        kind = str(term.get("kind", "") if isinstance(term, Mapping) else term.kind)  # type: ignore[attr-defined]
        same = sum(name == kind or name.startswith(f"{kind}_") for name in named)
        named[f"{kind}_{same + 1}" if same else kind] = term
    return named


def changed(config: Model, **sections: Any) -> Model:
    """The configuration with other values. Sections are merged key by key, at every depth."""
    return type(config).model_validate(merged(config.model_dump(), sections))


def merged(values: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with those of ``over``, key by key."""
    result = dict(values)
    for key, value in over.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(value, Mapping) and isinstance(old, Mapping) else value
    return result
