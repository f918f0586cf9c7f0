"""A stage of consistency distillation: TSCD with k segments, and the baselines that are settings of the same terms."""

from __future__ import annotations

import logging
from dataclasses import replace

from torch import Tensor

from hypersd_pipeline.data.cache import LatentCache
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.files import tensors_sha256
from hypersd_pipeline.models.adapters import AdaptedBackbone
from hypersd_pipeline.models.contract import Contract
from hypersd_pipeline.models.lora import LoRA
from hypersd_pipeline.models.teacher import Teacher, TeacherConfig
from hypersd_pipeline.models.user_lora import read_user_lora
from hypersd_pipeline.recipes.launch import on_ranks
from hypersd_pipeline.recipes.stage import Outputs, context_of, hold_frozen, load_for, provenance, run_stage, stage_identity
from hypersd_pipeline.training.checkpoints import Identity
from hypersd_pipeline.training.config import StageConfig
from hypersd_pipeline.training.ema import ema_update
from hypersd_pipeline.training.loop import make_accelerator
from hypersd_pipeline.training.stage import Stage, needs
from hypersd_pipeline.training.terms.adversarial import Adversary

log = logging.getLogger(__name__)


@on_ranks
def distil(
    latents: LatentCache, teacher: TeacherConfig, stage: StageConfig, outputs: Outputs, previous: LoRA | None = None
) -> tuple[LoRA, dict[str, float]]:
    """Distil one stage and return its LoRA, the averaged weights, with its sampling contract, and its report.

    Args:
        latents: the cache. Its ``train`` split is used.
        previous: the LoRA of the stage before, from which this one starts. A first stage may name a LoRA of the user's (``stage.start``).

    Raises:
        UserError: the stage has no consistency term, its grid misses a boundary, ``teacher: previous_stage`` without a stage before, or the
            cache was made by another teacher.
    """
    check_consistency(stage, has_previous=previous is not None)
    accelerator = make_accelerator(stage.loop)
    model = load_for(stage, teacher, latents, accelerator)
    start = previous if stage.start is None else read_user_lora(stage.start, model.backbone)
    adapters = make_adapters(model, stage, start)
    student, ema = adapters.parameters("student"), adapters.parameters("ema")
    assert stage.consistency is not None
    segments = stage.consistency.segments
    judge = _KeptJudge(stage, start)
    report = run_stage(
        f"k{segments}",
        stage,
        context_of(stage, model, adapters, latents, adapters.denoiser("student")),
        outputs,
        accelerator,
        parameters=student,
        identity=judge.within(stage_identity(stage, model, latents, start, "distil")),
        state={"adapters": adapters},
        after_update=lambda: ema_update(ema, student, stage.ema_decay),
        ready=lambda: adapters.use("student"),
        built=judge.take_up,
    )
    contract = Contract(segments, stage.sampling.eta, one_step_timestep=stage.sampling.one_step_timestep)
    metadata = {
        **provenance(model, latents, f"consistency distillation with {segments} segments (Hyper-SD, arXiv 2404.13686)"),
        "segments": str(segments),
        "sampling_contract": contract.to_json(model.scheduler_config()),
    }
    return replace(adapters.export("ema", metadata), judge=judge.head()), report


class _KeptJudge:
    """The discriminator's head between stages, where a stage keeps it (``terms.adversarial.keep``)."""

    def __init__(self, stage: StageConfig, start: LoRA | None) -> None:
        self.keep = stage.adversarial is not None and stage.adversarial.keep
        self.given = dict(start.judge) if self.keep and start is not None else {}
        self.adversary: Adversary | None = None

    def within(self, identity: Identity) -> Identity:
        """The stage's identity, on which the head that it starts from has a part."""
        return Identity({**identity.parts, "judge": tensors_sha256(self.given)}) if self.given else identity

    def take_up(self, stage: Stage) -> None:
        """Give the stage the head of the stage before."""
        self.adversary = stage.adversary if self.keep else None
        if self.adversary is not None and self.given and not self.adversary.start_from(self.given):
            log.warning("The discriminator of the stage before has other levels or another width, so that it starts anew.")

    def head(self) -> dict[str, Tensor]:
        """A copy of the head after the stage, or nothing."""
        if self.adversary is None:
            return {}
        return {name: tensor.detach().cpu().clone() for name, tensor in self.adversary.head.state_dict().items()}


def make_adapters(model: Teacher, stage: StageConfig, start: LoRA | None = None) -> AdaptedBackbone:
    """The adapters that a stage needs on one network, all from the same LoRA, if there is one."""
    solver = stage.consistency is not None and stage.consistency.teacher == "previous_stage"
    more = needs(stage)
    hold_frozen(model.backbone, stage)
    adapters = AdaptedBackbone(
        model.backbone,
        model.process,
        rank=stage.lora.rank,
        target_modules=stage.lora.target_modules,
        names=("student", "ema", "previous") if solver else ("student", "ema"),
        trainable=("student", *more["trainable"]),
        start=start,
        fresh_names=more["fresh_names"],
        encoder_names=more["encoder_names"],
        seed=stage.loop.seed,
    )
    if stage.gradient_checkpointing:
        model.backbone.checkpoint_gradients()
    return adapters


def check_consistency(stage: StageConfig, *, has_previous: bool) -> None:
    """Raises UserError for a stage without a consistency term, with two starts, or with ``teacher: previous_stage`` and no stage before."""
    if stage.consistency is None:
        raise UserError("stage.terms: a distillation stage needs a consistency term with a weight above 0; add one.")
    if stage.start is not None and has_previous:
        raise UserError("stage.start: this stage starts from the LoRA of the stage before; set start for the first stage only.")
    if stage.consistency.teacher == "previous_stage" and not has_previous:
        raise UserError(
            f"stage.terms.consistency.teacher (segments: {stage.consistency.segments}): previous_stage needs a stage before this one; use "
            "base for the first stage."
        )
