"""Configuration of the ablation, and the cells that follow from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from pydantic import Field, field_validator

from hypersd_pipeline.config import Strict
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.pipelines.dmd.config import OneStepConfig
from hypersd_pipeline.pipelines.tscd.config import check_previous
from hypersd_pipeline.training.cost import ideal_forwards, matching_forwards
from hypersd_pipeline.training.distillation import StageConfig, changed


class AblationConfig(Strict):
    """What is compared, and what each training may cost.

    Attributes:
        budget: of a training, all its stages together, in forward passes of the UNet on as many images as an update of the TSCD stages has;
            evaluation is not counted.
        shares: of the budget, for the stages of a chain with 8, 4, 2 and 1 segments.
        one_step_share: of the budget, for the one-step stage of the cell that has all of Hyper-SD's stages; the others get the rest.
        pairs: of that stage's regression, in place of ``dmd``'s own number, since the budget pays for them too.
        sampling_eta: of the sampling of the TSCD cells, whose last stage is TCD's too and is sampled as TCD is.
        sampling_first: the timestep that one step is told in every cell, or null for T - 1; an eps model prefers a smaller one.
        encoder_share: what the encoder and mid block cost of a forward pass; a constant, so that a second run plans the same steps.
        seeds: each cell is trained once with each, seed by seed.
        only: names of the cells to run; null runs all.
    """

    budget: float = Field(gt=0)
    shares: tuple[float, float, float, float] = (0.2, 0.2, 0.2, 0.4)
    one_step_share: float = Field(default=0.5, gt=0, lt=1)
    pairs: int = Field(default=256, ge=1)
    sampling_eta: float = Field(default=0.3, ge=0, le=1)
    sampling_first: int | None = Field(default=None, ge=1)
    encoder_share: float = Field(default=0.4, gt=0, le=1)
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    only: tuple[str, ...] | None = None

    @field_validator("shares")
    @classmethod
    def _whole(cls, shares: tuple[float, ...]) -> tuple[float, ...]:
        if min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError("shares must be positive and add up to 1")
        return shares


@dataclass(frozen=True)
class Cell:
    """One candidate: a name and its stages, in order.

    ``batch`` images make the forward pass that costs are counted in; it is the same in all cells.
    """

    name: str
    stages: tuple[StageConfig | OneStepConfig, ...]
    batch: int

    def seeded(self, seed: int) -> Cell:
        """The same with another seed."""
        return replace(self, stages=tuple(changed(stage, loop={"seed": seed}) for stage in self.stages))


def plan(
    config: AblationConfig,
    tscd: dict[int, StageConfig],
    baselines: dict[str, tuple[StageConfig, ...]],
    unified: OneStepConfig,
    one_step: dict[str, OneStepConfig],
) -> list[Cell]:
    """The cells: {k=1, 8-4-2-1} x {MSE, hybrid} x {offset noise on, off} x {teacher base, previous stage}, Hyper-SD, and the baselines.

    A single stage has no previous one, so that it comes with ``base`` only. "Hyper-SD" is the chain and the one-step stage, without
    feedback: no other method has a reward model.

    Args:
        tscd: segments -> the stage as configured. baselines: name -> its stages. unified: the one-step stage. one_step: further baselines.

    Raises:
        UserError: ``only`` names a cell that there is not, the budget is too small for a stage, or the first stage of a baseline asks for a
            previous one.
    """
    chains: dict[str, list[StageConfig]] = {"8-4-2-1": [tscd[k] for k in (8, 4, 2, 1)], "k=1": [tscd[1]]}
    batch = tscd[8].loop.batch_size
    cells = []
    for (chain, stages), hybrid, offset, previous in product(chains.items(), (True, False), (True, False), (False, True)):
        if previous and len(stages) == 1:
            continue
        name = f"{chain} {'hybrid' if hybrid else 'MSE'}{'' if offset else ', no offset noise'}{', previous stage' if previous else ''}"
        variants = [_variant(s, hybrid, offset, previous and i > 0) for i, s in enumerate(stages)]
        cells.append(Cell(name, (*variants[:-1], changed(variants[-1], sampling_eta=config.sampling_eta)), batch))
    for first, *_ in baselines.values():
        check_previous(first, has_previous=False)
    cells.append(Cell("Hyper-SD", (*chains["8-4-2-1"], changed(unified, pairs={"count": config.pairs})), batch))
    cells += [Cell(name, stages, batch) for name, stages in baselines.items()]
    cells += [Cell(name, (stage,), batch) for name, stage in one_step.items()]
    known = [cell.name for cell in cells]
    if unknown := [name for name in config.only or () if name not in known]:
        raise UserError(f"ablation.only: there is no cell {unknown[0]!r}; the cells are {'; '.join(known)}.")
    return [replace(cell, stages=_within_budget(cell, config)) for cell in cells if config.only is None or cell.name in config.only]


def _variant(stage: StageConfig, hybrid: bool, offset: bool, previous: bool) -> StageConfig:
    changes: dict[str, Any] = {"teacher": "previous_stage" if previous else "base"}
    if not offset:
        changes["offset_noise"] = 0.0
    if not hybrid:
        changes |= {"mse_weight": 1.0, "adversarial": {"weight": 0.0}}
    return changed(stage, **changes)


def _within_budget(cell: Cell, config: AblationConfig) -> tuple[StageConfig | OneStepConfig, ...]:
    chain = config.shares if config.shares and len(cell.stages) >= 4 else (1.0,)
    rest = 1 - config.one_step_share
    shares = (*(share * rest for share in chain), config.one_step_share) if len(cell.stages) == 5 else chain
    paid = [_paid(stage, config.budget * share, cell, config) for stage, share in zip(cell.stages, shares, strict=True)]
    if isinstance(paid[-1], StageConfig):  # a one-step stage is sampled as it was trained
        paid[-1] = changed(paid[-1], sampling_first=config.sampling_first)
    return tuple(paid)


def _paid(stage: StageConfig | OneStepConfig, forwards: float, cell: Cell, config: AblationConfig) -> StageConfig | OneStepConfig:
    """The stage with as many steps as its forwards pay for, its pairs included."""
    steps = round((forwards - prepared_forwards(stage, cell.batch)) / step_forwards(stage, cell.batch, config.encoder_share))
    if steps < 1:
        raise UserError(f"ablation.budget: {config.budget:g} forward passes do not pay for one step of '{cell.name}'; raise it.")
    return changed(stage, loop={"steps": steps})


def step_forwards(stage: StageConfig | OneStepConfig, batch: int, encoder_share: float) -> float:
    """Forward passes, on ``batch`` images, of one update, which may have another number of images itself."""
    own = stage.loop.batch_size / batch
    if isinstance(stage, StageConfig):
        return own * ideal_forwards(stage, encoder_share)
    images = stage.loop.batch_size // stage.loop.accumulate
    judged, again = stage.adversarial.weight > 0, stage.gradient_checkpointing
    return own * matching_forwards(
        stage.matching, images, encoder_share, adversarial=judged, full=False, again=again, passes=stage.loop.accumulate
    )


def prepared_forwards(stage: StageConfig | OneStepConfig, batch: int) -> float:
    """Forward passes, on ``batch`` images, of what is made before the training: the pairs of a regression."""
    if isinstance(stage, StageConfig) or not stage.needs_pairs:
        return 0.0
    pairs = stage.pairs
    return pairs.count / batch * pairs.steps * (2 if pairs.source == "teacher" else 1)
