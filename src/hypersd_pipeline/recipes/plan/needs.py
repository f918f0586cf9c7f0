"""What a stage needs: its real objects are built, and two passes of it run, on tensors without memory."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.data.memory import MemoryRows
from hypersd_pipeline.data.trajectories import NoisePairs
from hypersd_pipeline.diffusion.denoiser import Denoiser
from hypersd_pipeline.draws import Draws
from hypersd_pipeline.evaluation.probe import Judges, Probe
from hypersd_pipeline.files import write_text
from hypersd_pipeline.models.adapters import AdaptedBackbone
from hypersd_pipeline.models.public import build, default_dtype
from hypersd_pipeline.models.teacher import Teacher, TeacherConfig
from hypersd_pipeline.perception.protocol import Instances, LabelMap
from hypersd_pipeline.recipes.blank import blank_perceptual, blank_reward
from hypersd_pipeline.recipes.distil import make_adapters
from hypersd_pipeline.recipes.feedback import STUDENT, feedback_adapters
from hypersd_pipeline.recipes.one_step import unet_networks, unified_adapters
from hypersd_pipeline.recipes.plan.dry import Meter, bytes_of, dry_run
from hypersd_pipeline.recipes.stage import context_of
from hypersd_pipeline.training.config import FeedbackConfig, OneStepConfig, StageConfig, changed
from hypersd_pipeline.training.cost import prepared_forwards
from hypersd_pipeline.training.critic import Critic
from hypersd_pipeline.training.ema import ema_update
from hypersd_pipeline.training.guard import Guard
from hypersd_pipeline.training.loop import make_optimizer
from hypersd_pipeline.training.stage import Stage, build_stage
from hypersd_pipeline.training.terms import AdversarialConfig, MatchingConfig, PerceptualConfig, RewardTermConfig

UNET = "one_step_unet"
_TOKENS = 77
_ROWS = 4
_VARIANTS = {"fp16": torch.float16, "bf16": torch.bfloat16}
"""Types of the weights in files of a variant."""
_OF_TIME = {"steps", "learning_rate", "schedule", "warmup_steps", "seed"}


@dataclass(frozen=True)
class Needs:
    """Of one process that trains a stage with so many images a pass.

    Attributes:
        batch: images of a pass. parameters: of all networks. trained: of those, what the student's optimiser moves.
        loading: bytes at the worst moment of loading, on the CPU: a network in the type of its file and in that in which it is held.
        static: bytes between two passes: weights, moments, gradients that are kept. peak: bytes at the worst moment of a pass.
        operations: floating-point operations of a pass. forward: of one pass of the frozen network without gradients.
        checkpoint: bytes of one checkpoint.
    """

    batch: int
    parameters: int
    trained: int
    loading: int
    static: int
    peak: int
    operations: int
    forward: int
    checkpoint: int

    @property
    def activations(self) -> int:
        """Bytes that come and go within a pass."""
        return self.peak - self.static


@dataclass(frozen=True)
class _Built:
    """A stage's real objects.

    Attributes:
        stage_of: builds the stage for so many images a pass, on the same networks.
        networks: all but the heads of a discriminator. student: what the main optimiser moves.
        modules: what a checkpoint holds besides optimisers and opponents.
        judge: what the guard of feedback learning does with so many images. Nothing in other stages.
    """

    stage_of: Callable[[int], Stage]
    adapters: AdaptedBackbone
    networks: Callable[[], Sequence[nn.Module]]
    student: Sequence[nn.Parameter]
    after_update: Callable[[], None]
    modules: Sequence[Any]
    judge: Callable[[int], None]


def needs_of(
    key: str, stage: StageConfig, teacher: TeacherConfig, told: Mapping[str, Any], batch: int | None = None, judged: int = 1
) -> Needs:
    """See `needs_at`, for one number of images."""
    return needs_at(key, stage, teacher, told, batch, judged=judged)[0]


def needs_at(
    key: str,
    stage: StageConfig,
    teacher: TeacherConfig,
    told: Mapping[str, Any],
    batch: int | None = None,
    then: Callable[[Needs], int] | None = None,
    judged: int = 1,
) -> list[Needs]:
    """Build the stage and run a pass of it with everything in place, on tensors without memory.

    Args:
        key: such as ``tscd_k8``. told: the teacher's architecture, see `description`.
        batch: images of a pass. None: the configuration's, for one process.
        then: the images of a second pass, from the needs of the first. None: there is no second.
        judged: images that the guard of feedback learning makes and judges at a time.
    """
    passes = stage.loop.accumulate
    batch = batch or stage.loop.batch_size // passes
    stage = changed(stage, loop={"batch_size": batch * passes, "compile": False}, terms=_without_warm_up(stage))
    model = blank_teacher(teacher, told)
    with dry_run() as meter:
        built = _build(key, stage, model, told)
        loading = meter.peak
        optimizer = make_optimizer(list(built.student), stage.loop)
        _settle([optimizer], keep=passes > 1)
        built.after_update()
        found = [_measured(meter, built, optimizer, stage, model, told, batch, loading, judged)]
        if then is not None:
            found.append(_measured(meter, built, optimizer, stage, model, told, then(found[0]), loading, judged))
    return found


def _measured(
    meter: Meter,
    built: _Built,
    optimizer: torch.optim.Optimizer,
    stage: StageConfig,
    model: Teacher,
    told: Mapping[str, Any],
    batch: int,
    loading: int,
    judged: int,
) -> Needs:
    """The needs of a stage that has made an update."""
    half = stage.loop.mixed_precision == "bf16"
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=half)  # tensors without memory are the CPU's, whatever is there
    made = built.stage_of(batch)
    companions, opponents = list(made.companions().values()), made.state()
    critics = [part.optimizer for part in opponents.values() if isinstance(part, Critic)]
    _settle(companions, keep=stage.loop.accumulate > 1)
    _settle(critics, keep=False)
    generator = Draws()
    generator.manual_seed(0)
    meter.reset()
    static = meter.now
    with autocast():
        loss, _ = made(generator)
    (loss / stage.loop.accumulate).backward()  # type: ignore[no-untyped-call]
    del loss
    peak, operations = meter.peak, meter.operations
    meter.reset()
    built.judge(judged)
    peak = max(peak, meter.peak)
    heads = [made.adversary.head] if made.adversary is not None else []
    parameters = sum(p.numel() for p in {id(p): p for network in (*built.networks(), *heads) for p in network.parameters()}.values())
    held = [part.state_dict() for part in (*built.modules, *opponents.values())]
    checkpoint = bytes_of(held, [each.state_dict() for each in (optimizer, *companions)])
    meter.reset()
    with torch.no_grad(), autocast():
        noise, conditioning = torch.empty(batch, *model.latent_shape), _conditioning(told, batch)
        built.adapters.denoiser(None).predict(noise, torch.zeros(batch, dtype=torch.int64), conditioning)
    forward = meter.operations
    trained = sum(p.numel() for p in built.student)
    if stage.loop.accumulate == 1:
        optimizer.zero_grad()
    return Needs(batch, parameters, trained, loading, static, peak, operations, forward, checkpoint)


def _settle(optimizers: Iterable[torch.optim.Optimizer], *, keep: bool) -> None:
    """Bring optimisers to where they are after an update. keep: the gradients, as between two passes of an update."""
    for optimizer in optimizers:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        if not keep:
            optimizer.zero_grad()


def _without_warm_up(stage: StageConfig) -> dict[str, Any]:
    """The warm-up of a critic or a discriminator needs no more memory than its updates, and would take long."""
    none: dict[type, dict[str, Any]] = {MatchingConfig: {"critic": {"warmup_updates": 0}}, AdversarialConfig: {"warmup_updates": 0}}
    return {name: none[type(term)] for name, term in stage.active().items() if type(term) in none}


def form_of(key: str, stage: StageConfig) -> str:
    """What memory depends on: stages that differ in weights, rates and numbers of updates need the same."""
    values = stage.model_dump(mode="json", exclude={"loop": _OF_TIME, "sampling": True})
    for name, term in values["terms"].items():
        term.update(weight=bool(term["weight"]), segments=None)
        if not term["weight"]:
            values["terms"][name] = None
    return repr((key if key == "one_step_unet" else type(stage).__name__, values))


def preparation(stage: StageConfig, needs: Needs) -> float:
    """Floating-point operations of what is made before the training: stored pairs."""
    return prepared_forwards(stage, needs.batch) * needs.forward


def blank_teacher(config: TeacherConfig, told: Mapping[str, Any]) -> Teacher:
    """A teacher of the described architecture that knows its configuration, and has no networks yet."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        index: dict[str, Any] = dict(told["pipeline"])
        for name, network in told["networks"].items():
            (folder / name).mkdir()
            write_text(folder / name / "config.json", json.dumps({**network["config"], "_class_name": network["class"][1]}))
            index[name] = list(network["class"])
        (folder / "scheduler").mkdir()
        write_text(folder / "scheduler" / "scheduler_config.json", json.dumps(told["scheduler"]))
        write_text(folder / "model_index.json", json.dumps(index))
        return Teacher(config, folder, torch.device("cpu"))


def text_widths(told: Mapping[str, Any]) -> tuple[int, int | None]:
    """Width of the prompts' embeddings, and of the pooled one where there is one."""
    first, second = (told["networks"].get(name) for name in ("text_encoder", "text_encoder_2"))
    if second is None:
        return first["config"]["hidden_size"], None
    return first["config"]["hidden_size"] + second["config"]["hidden_size"], second["config"]["projection_dim"]


def _conditioning(told: Mapping[str, Any], n: int) -> Conditioning:
    width, pooled = text_widths(told)
    tensors = (torch.empty(n, pooled), torch.empty(n, 6)) if pooled is not None else ()
    return Conditioning(torch.empty(n, _TOKENS, width), *tensors)


def _build(key: str, stage: StageConfig, model: Teacher, told: Mapping[str, Any]) -> _Built:
    """What the stage's recipe builds, without its files."""
    rewards = {name: _Judge(term.reward) for name, term in stage.active().items() if isinstance(term, RewardTermConfig)}
    terms = {name: term.model_copy(update={"reward": rewards[name]}) if name in rewards else term for name, term in stage.terms.items()}
    stage = stage.model_copy(update={"terms": terms})
    perceptual = stage.one(PerceptualConfig)
    segmenter = None if perceptual is None else _Segmenter(perceptual)
    held_out = None
    if isinstance(stage, FeedbackConfig):  # loads its judges before its networks
        for reward in rewards.values():
            reward.load(model.device)
        held_out = blank_reward(stage.held_out)
    model._backbone = model._family(_network(model._family.component, told, model, model.config.dtype))
    networks: list[nn.Module] = [model.backbone.module]
    if stage.needs_images or isinstance(stage, FeedbackConfig):
        model._vae = _network("vae", told, model, model.config.vae_dtype)
        networks.append(model.vae)
    latents: Any = _Latents(_rows(model, told))
    pairs = NoisePairs(torch.empty(_ROWS, *model.latent_shape), torch.empty(_ROWS, *model.latent_shape), torch.arange(_ROWS))
    more: dict[str, Any] = {"pairs": pairs, "perceptual": segmenter, "annotated": _Annotated(model.resolution)}
    if key == UNET and isinstance(stage, OneStepConfig):
        backbone, average, adapters = unet_networks(model, stage, None)
        student, averaged = list(backbone.module.parameters()), list(average.parameters())
        denoiser, ready, judge = Denoiser(backbone, model.process), _nothing, _nothing
        networks += [backbone.module, average]
        modules: list[Any] = [adapters, backbone.module, average]
    else:
        name = STUDENT if isinstance(stage, FeedbackConfig) else "student"
        adapters = _adapters(model, stage)
        student = adapters.parameters(name)
        averaged = adapters.parameters("ema") if "ema" in adapters.names else []
        denoiser, ready = adapters.denoiser(name), partial(adapters.use, name)
        modules, judge = [adapters], _nothing
    if isinstance(stage, FeedbackConfig):
        assert held_out is not None
        modules.append(Guard(stage.guard, dict, student, _nothing, stage.loop.steps, scores=lambda: torch.empty(0)))
        judges = Judges([(reward.network, 1.0) for reward in rewards.values()], held_out)
        judge = partial(_judge, model, judges, denoiser.in_bf16(stage.loop.mixed_precision == "bf16"), stage, told)
    context = context_of(stage, model, adapters, latents, denoiser, **more)
    networks += [n for n in (held_out, segmenter.network if segmenter else None) if isinstance(n, nn.Module)]

    def after_update() -> None:
        if averaged:
            ema_update(averaged, student, stage.ema_decay)

    def all_networks() -> list[nn.Module]:
        return networks + [judge.network for judge in rewards.values() if isinstance(judge.network, nn.Module)]

    def stage_of(batch: int) -> Stage:
        return build_stage(stage, replace(context, batch=batch), ready)

    return _Built(stage_of, adapters, all_networks, student, after_update, modules, judge)


def _nothing(*_: Any) -> None:
    """What a stage does not need."""


def _judge(model: Teacher, judges: Judges, denoiser: Denoiser, stage: FeedbackConfig, told: Mapping[str, Any], images: int) -> None:
    """A measurement of the guard, of as many prompts as it samples at a time. The small network of its features is left out."""
    cond = _conditioning(told, images)
    probe = Probe(model, judges, _no_features, ["a"] * images, cond, stage.sample.steps, 0, stage.guard.variants, images)  # type: ignore[arg-type]
    probe.measure(denoiser)


def _no_features(images: Tensor) -> Tensor:
    return torch.empty(len(images), 1)


def _adapters(model: Teacher, stage: StageConfig) -> AdaptedBackbone:
    match stage:
        case FeedbackConfig():
            return feedback_adapters(model, None, stage)
        case OneStepConfig():
            return unified_adapters(model, stage, None, rank=stage.start_rank)
    return make_adapters(model, stage)


def _network(name: str, told: Mapping[str, Any], model: Teacher, dtype: str) -> Any:
    """A network as it is loaded. Where its file has another type, that is in memory too until all is converted."""
    with default_dtype(getattr(torch, dtype)):
        network = build(told["networks"][name]).requires_grad_(False).eval()
    stored = _VARIANTS.get(model.config.variant or "", torch.float32)
    if stored != getattr(torch, dtype):
        whole = sum(parameter.numel() for parameter in network.parameters()) * stored.itemsize
        torch.empty(_largest_file(Path(model.config.source).expanduser() / name, model.config.variant) or whole, dtype=torch.uint8)
    return network


def _largest_file(folder: Path, variant: str | None) -> int:
    """Bytes of the largest file of weights, of which one at a time is read. 0: the network is not here yet."""
    return max((file.stat().st_size for file in folder.glob(f"*{variant or ''}*.safetensors")), default=0)


def _rows(model: Teacher, told: Mapping[str, Any]) -> MemoryRows:
    return MemoryRows(torch.empty(_ROWS, *model.latent_shape), _conditioning(told, _ROWS), _conditioning(told, 1), ["a"] * _ROWS)


@dataclass(frozen=True)
class _Latents:
    """A cache of which any split has the same rows."""

    rows: MemoryRows

    def split(self, name: str) -> MemoryRows:
        return self.rows


class _Judge:
    """In the place of a reward's configuration: builds the reward without its files, once."""

    def __init__(self, config: Any) -> None:
        self.network: Any = None
        self.config = config

    def load(self, device: torch.device | str) -> Any:
        if self.network is None:
            self.network = blank_reward(self.config)
        return self.network


class _Segmenter:
    """A perceptual model whose loss is the sum of what its network puts out. The true loss depends on the images."""

    labels = LabelMap()

    def __init__(self, config: PerceptualConfig) -> None:
        self.network: Any = blank_perceptual(config.model)

    def loss(self, images: Tensor, instances: Sequence[Instances]) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            found = self.network.net(self.network._pixels(images)) if hasattr(self.network, "net") else images
        return torch.stack([tensor.float().sum() for tensor in _tensors(found)]).sum()


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, list | tuple) else []


@dataclass(frozen=True)
class _Annotated:
    """Images that all have no instances."""

    resolution: int

    def annotated(self) -> Tensor:
        return torch.arange(_ROWS)

    def instances(self, index: int) -> Instances:
        return Instances(torch.zeros(0, self.resolution, self.resolution, dtype=torch.bool), torch.zeros(0, dtype=torch.int64))
