"""What is compared: chains of stages, and the number of steps that each may take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, field_validator

from hypersd_pipeline.config import Count, Seed, Share, Strict, Timestep
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.recipes.distil import check_consistency
from hypersd_pipeline.training.config import FeedbackConfig, OneStepConfig, StageConfig, changed
from hypersd_pipeline.training.cost import ideal_forwards, prepared_forwards


def _kind(stage: Any) -> str:
    """Which configuration a section of ``conf/`` is: with a held-out reward, with what only one-step stages have, or neither."""
    if isinstance(stage, StageConfig):
        return {FeedbackConfig: "feedback", OneStepConfig: "one_step"}.get(type(stage), "distil")
    if "held_out" in stage:
        return "feedback"
    terms = stage.get("terms") or {}
    named = terms.items() if isinstance(terms, Mapping) else [("", term) for term in terms]
    kinds = {term.get("kind", name) if isinstance(term, Mapping) else term.kind for name, term in named if term is not None}
    own = set(OneStepConfig.model_fields) - set(StageConfig.model_fields)
    return "one_step" if kinds & {"matching", "regression"} or own & set(stage) else "distil"


AnyStage = Annotated[
    Annotated[StageConfig, Tag("distil")] | Annotated[OneStepConfig, Tag("one_step")] | Annotated[FeedbackConfig, Tag("feedback")],
    Discriminator(_kind),
]


class ReplicatesConfig(Strict):
    """The whole chain once per seed.

    Attributes:
        seeds: with each of which the chain is trained. Data, prompts and noise of the evaluation stay the same.
        chain: model -> its stage, in order: ``k8`` ... ``k1``, ``feedback``, ``unified``, ``unet``.
    """

    seeds: tuple[Seed, ...] = Field(min_length=1)
    chain: dict[str, AnyStage]


class AblationConfig(Strict):
    """What is compared, and what each training may cost.

    Attributes:
        budget: of a training, all its stages together, in forward passes of the network on as many images as an update of the TSCD stages
            has. Evaluation is not counted.
        shares: of the budget, for the stages of a chain with 8, 4, 2 and 1 segments.
        one_step_share: of the budget, for the one-step stage of the cell that has all of Hyper-SD's stages. The others get the rest.
        pairs: of that stage's regression, in place of ``dmd``'s own number, since the budget pays for them too.
        sampling_eta: of the sampling of the TSCD cells, whose last stage is TCD's too and is sampled as TCD is.
        one_step_timestep: the timestep that one step is told in every cell, or null for T - 1. An eps model prefers a smaller one.
        encoder_share: what the encoder costs of a forward pass; a constant, so that a second run plans the same steps.
        seeds: each cell is trained once with each, seed by seed.
        only: names of the cells to run. Null runs all.
        cells: further cells, name -> its stages by model. Each stage has the number of steps that it names: no budget.
        compare: name of a cell -> name of the cell that it is compared with, for the table of paired differences.
        tscd: ``k8`` ... ``k1`` -> the stage as configured. one_step: the one-step stage. baselines: name -> its stages, by model.
    """

    budget: float = Field(gt=0, le=1e12)
    shares: tuple[Share, Share, Share, Share]
    one_step_share: float = Field(default=0.5, gt=0, lt=1)
    pairs: Count = 256
    sampling_eta: Share = 0.3
    one_step_timestep: Timestep | None = None
    encoder_share: float = Field(default=0.4, gt=0, le=1)
    seeds: tuple[Seed, ...] = Field(default=(0, 1, 2), min_length=1)
    only: tuple[str, ...] | None = None
    tscd: dict[str, StageConfig]
    one_step: OneStepConfig
    baselines: dict[str, dict[str, AnyStage]] = Field(default={})
    cells: dict[str, dict[str, AnyStage]] = Field(default={})
    compare: dict[str, str] = Field(default={})

    @field_validator("shares")
    @classmethod
    def _whole(cls, shares: tuple[float, ...]) -> tuple[float, ...]:
        if min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError("shares must be positive and add up to 1")
        return shares


@dataclass(frozen=True)
class Cell:
    """One candidate: a name and its stages by model, in order.

    Attributes:
        batch: images of the forward pass that costs are counted in. It is the same in all cells.
        each: every model is evaluated and recorded under its own name, not the last one under the cell's.
    """

    name: str
    stages: dict[str, StageConfig]
    batch: int
    each: bool = False

    def seeded(self, seed: int) -> Cell:
        """The same with another seed."""
        return replace(self, stages={model: changed(stage, loop={"seed": seed}) for model, stage in self.stages.items()})


def plan_replicates(config: ReplicatesConfig) -> list[Cell]:
    """The whole chain, once for each seed's run."""
    batch = next(iter(config.chain.values())).loop.batch_size
    return [Cell("chain", dict(config.chain), batch, each=True)]


def plan(config: AblationConfig) -> list[Cell]:
    """The cells: {k=1, 8-4-2-1} x {MSE, hybrid} x {offset noise on, off} x {teacher base, previous stage}, Hyper-SD, and the baselines.

    A single stage has no previous one, so that it comes with ``base`` only. "Hyper-SD" is the chain and the one-step stage, without
    feedback: no other method has a reward model.

    Raises:
        UserError: ``only`` or ``compare`` names a cell that there is not, two cells have one name, the budget is too small for a stage, or
            the first stage of a cell asks for a previous one.
    """
    chains = {"8-4-2-1": dict(config.tscd), "k=1": {"k1": config.tscd["k1"]}}
    batch = config.tscd["k8"].loop.batch_size
    cells = []
    for (chain, stages), hybrid, offset, previous in product(chains.items(), (True, False), (True, False), (False, True)):
        if previous and len(stages) == 1:
            continue
        name = f"{chain} {'hybrid' if hybrid else 'MSE'}{'' if offset else ', no offset noise'}{', previous stage' if previous else ''}"
        variants = {model: _variant(s, hybrid, offset, previous and i > 0) for i, (model, s) in enumerate(stages.items())}
        last = list(variants)[-1]
        variants[last] = changed(variants[last], sampling={"eta": config.sampling_eta})
        cells.append(Cell(name, variants, batch))
    for stages in (*config.baselines.values(), *config.cells.values()):
        first = next(iter(stages.values()))
        if not isinstance(first, OneStepConfig):
            check_consistency(first, has_previous=False)
    unified = (
        changed(config.one_step, terms={"regression": {"pairs": {"count": config.pairs}}}) if config.one_step.pairs else config.one_step
    )
    cells.append(Cell("Hyper-SD", {**config.tscd, "unified": unified}, batch))
    cells += [Cell(name, dict(stages), batch) for name, stages in config.baselines.items()]
    own = [Cell(name, dict(stages), batch) for name, stages in config.cells.items()]
    known = [cell.name for cell in (*cells, *own)]
    for key, names in (("only", config.only or ()), ("compare", (*config.compare, *config.compare.values()))):
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"ablation.{key}: there is no cell {unknown[0]!r}; the cells are {'; '.join(known)}.")
    if twice := next((name for name in known if known.count(name) > 1), None):
        raise UserError(f"ablation.cells: there is another cell {twice!r} already; give it another name.")
    chosen = [cell for cell in cells if config.only is None or cell.name in config.only]
    paid = [replace(cell, stages=_within_budget(cell, config)) for cell in chosen]
    return paid + [cell for cell in own if config.only is None or cell.name in config.only]


def _variant(stage: StageConfig, hybrid: bool, offset: bool, previous: bool) -> StageConfig:
    terms: dict[str, Any] = {"consistency": {"teacher": "previous_stage" if previous else "base"}}
    if not offset:
        terms["consistency"]["offset_noise"] = 0.0
    if not hybrid:
        terms = {**terms, "consistency": {**terms["consistency"], "weight": 1.0}, "adversarial": None}
    return changed(stage, terms=terms)


def _within_budget(cell: Cell, config: AblationConfig) -> dict[str, StageConfig]:
    chain = config.shares if len(cell.stages) >= 4 else (1.0,)
    rest = 1 - config.one_step_share
    shares = (*(share * rest for share in chain), config.one_step_share) if len(cell.stages) == 5 else chain
    stages = {
        model: _paid(stage, config.budget * share, cell, config) for (model, stage), share in zip(cell.stages.items(), shares, strict=True)
    }
    last = list(stages)[-1]
    if not isinstance(stages[last], OneStepConfig):  # a one-step stage is sampled as it was trained
        stages[last] = changed(stages[last], sampling={"one_step_timestep": config.one_step_timestep})
    return stages


def _paid(stage: StageConfig, forwards: float, cell: Cell, config: AblationConfig) -> StageConfig:
    """The stage with as many steps as its forwards pay for, its pairs included."""
    steps = round((forwards - prepared_forwards(stage, cell.batch)) / step_forwards(stage, cell.batch, config.encoder_share))
    if steps < 1:
        raise UserError(f"ablation.budget: {config.budget:g} forward passes do not pay for one step of '{cell.name}'; raise it.")
    return changed(stage, loop={"steps": steps})


def step_forwards(stage: StageConfig, batch: int, encoder_share: float) -> float:
    """Forward passes, on ``batch`` images, of one update, which may have another number of images itself."""
    return stage.loop.batch_size / batch * ideal_forwards(stage, encoder_share)
