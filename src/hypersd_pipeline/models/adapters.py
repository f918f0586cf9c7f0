"""Several LoRA adapters on one frozen network: student, EMA target and, where needed, the previous stage or a critic."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.diffusion.denoiser import Denoiser
from hypersd_pipeline.diffusion.process import Process
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.backbones import Backbone
from hypersd_pipeline.models.folded import adapted, is_plain
from hypersd_pipeline.models.lora import LoRA


class AdaptedBackbone:
    """One network in memory, seen through the base weights or through any of its adapters.

    The base is frozen. Only the adapters named in ``trainable`` require gradients. They are kept in float32.

    Args:
        backbone: loaded, frozen. Changed in place.
        process: that the network was trained for.
        rank: of every adapter. ``lora_alpha`` equals it, so that the scale is 1.
        ranks: of adapters in ``fresh_names`` and ``encoder_names`` whose rank is another one.
        target_modules: module-name endings, as peft matches them.
        names: the adapters.
        trainable: those that are trained.
        start: weights for ``names``, of the same or a lower rank. Otherwise A is random (seeded) and B zero, the same for all.
        fresh_names: further adapters that start at zero, whatever ``start`` is (a critic).
        encoder_names: further adapters that sit in the encoder only and start at zero, whatever ``start`` is (a discriminator).

    Raises:
        UserError: no module matches ``target_modules``, or ``start`` has a higher rank or further modules.
    """

    def __init__(
        self,
        backbone: Backbone,
        process: Process,
        *,
        rank: int,
        target_modules: Sequence[str],
        names: Sequence[str] = ("student", "ema"),
        trainable: Sequence[str] = ("student",),
        start: LoRA | None = None,
        fresh_names: Sequence[str] = (),
        encoder_names: Sequence[str] = (),
        ranks: Mapping[str, int] | None = None,
        seed: int = 0,
    ) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.backbone, self.process = backbone, process
        self.names = (*names, *fresh_names, *encoder_names)
        module = backbone.module
        backbone.check_targets(target_modules)
        _add_adapters(backbone, {name: (ranks or {}).get(name, rank) for name in self.names}, target_modules, encoder_names, seed)
        for parameter in (p for name, p in module.named_parameters() if ".lora_" in name):
            parameter.data = parameter.data.float()  # in bf16 an update of 1e-6 would round away
        # collected once: walking the module tree at each switch would cost more than the switch
        self._layers: list[Any] = [m for m in module.modules() if isinstance(m, BaseTunerLayer)]
        for layer in self._layers:
            layer.forward = partial(_forward, layer, layer.forward)
        self._layer_names = [name for name, m in module.named_modules() if isinstance(m, BaseTunerLayer)]
        if start is not None:
            self._load(self.names[0], start, rank)
        for name in names[1:]:
            for target, source in zip(self.parameters(name), self.parameters(self.names[0]), strict=True):
                target.data.copy_(source.data)
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        for name in trainable:
            for parameter in self.parameters(name):
                parameter.requires_grad_(True)
        self.use(None)

    def use(self, name: str | None) -> None:
        """Make the network compute with this adapter. None is the base alone.

        Sets what peft's ``set_adapter`` and ``disable_adapters`` set, without touching ``requires_grad``.
        """
        if name is not None and name not in self.names:
            raise ValueError(f"unknown adapter {name!r}; there are {self.names}")
        for layer in self._layers:
            layer._disable_adapters = name is None
            if name is not None:
                layer._active_adapter = [name]

    def denoiser(self, name: str | None) -> Denoiser:
        """A denoiser that computes with this adapter, whichever was used before.

        With gradient checkpointing the adapter must stay in use until the backward pass is over: call the student last.
        """

        def call(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
            self.use(name)
            return self.backbone(x_t, t, cond)

        return Denoiser(call, self.process)

    def features(self, name: str | None, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The encoder's features ``[b, C, h', w']`` with this adapter (see `Backbone.features`)."""
        self.use(name)
        return self.backbone.features(x_t, t, cond)

    def feature_levels(self, name: str | None, x_t: Tensor, t: Tensor, cond: Conditioning, levels: int) -> list[Tensor]:
        """The encoder's features at several levels with this adapter (see `Backbone.feature_levels`)."""
        self.use(name)
        return self.backbone.feature_levels(x_t, t, cond, levels)

    @contextmanager
    def watch_features(self) -> Iterator[list[Tensor]]:
        """See `Backbone.watch_features`."""
        with self.backbone.watch_features() as seen:
            yield seen

    def _pairs(self, name: str) -> list[tuple[str, Tensor, Tensor]]:
        layers = zip(self._layer_names, self._layers, strict=True)
        return [(n, m.lora_A[name].weight, m.lora_B[name].weight) for n, m in layers if name in m.lora_A]

    def parameters(self, name: str) -> list[torch.nn.Parameter]:
        """The adapter's A and B, in a fixed order."""
        return [p for _, a, b in self._pairs(name) for p in (a, b)]  # type: ignore[misc]

    def export(self, name: str, metadata: dict[str, str]) -> LoRA:
        """A copy of the adapter's weights, float32 on the CPU."""
        tensors = {}
        for module, a, b in self._pairs(name):
            tensors[f"{self.backbone.component}.{module}.lora_A.weight"] = a.detach().float().cpu().clone()
            tensors[f"{self.backbone.component}.{module}.lora_B.weight"] = b.detach().float().cpu().clone()
        return LoRA(tensors, metadata)

    def _load(self, name: str, lora: LoRA, rank: int) -> None:
        given = lora.modules()
        for module, (a, _) in given.items():
            if module not in self._layer_names:
                raise UserError(
                    f"lora.target_modules: the LoRA that the stage starts from also changes {module}, which is not among them; add it."
                )
            if len(a) > rank:
                raise UserError(f"lora.rank: {rank} is lower than the rank {len(a)} of the LoRA that the stage starts from; raise it.")
        for module, a, b in self._pairs(name):
            if module in given:  # what a LoRA of lower rank leaves free starts as a fresh one does: A at random, B at zero
                first, second = given[module]
                if a.shape[1:] != first.shape[1:] or len(b) != len(second):
                    raise UserError(f"LoRA module {module!r} does not fit this network; use a LoRA of the same family as the teacher.")
                a.data[: len(first)].copy_(first)
                b.data[:, : len(first)].copy_(second)

    def state_dict(self) -> dict[str, Any]:
        """All adapters, for a checkpoint."""
        return {name: [p.detach() for p in self.parameters(name)] for name in self.names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        for name in self.names:
            for parameter, saved in zip(self.parameters(name), state_dict[name], strict=True):
                parameter.data.copy_(saved)


def _forward(layer: Any, unusual: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A LoRA layer's forward pass: ours for linear layers and convolutions (`models.folded`), peft's own for ``unusual`` ones."""
    if layer._disable_adapters:
        return layer.base_layer(x)  # type: ignore[no-any-return]
    name = layer._active_adapter[0]
    if name not in layer.lora_A:  # the discriminator's adapter sits in the encoder only
        return layer.base_layer(x)  # type: ignore[no-any-return]
    if not is_plain(layer.base_layer):
        return unusual(x)
    return adapted(layer.base_layer, x, layer.lora_A[name].weight, layer.lora_B[name].weight)


def _add_adapters(
    backbone: Backbone, ranks: Mapping[str, int], target_modules: Sequence[str], encoder_names: Sequence[str], seed: int
) -> None:
    """Add peft's layers, everywhere or in the encoder only. All random numbers come from the seed."""
    from peft import LoraConfig, inject_adapter_in_model

    endings = "|".join(re.escape(ending) for ending in target_modules)
    in_encoder = rf"{backbone.encoder_modules}\.(.*\.)?({endings})"
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        # peft warns that a model with a second adapter has several, which is what we want
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        for name, rank in ranks.items():
            where = in_encoder if name in encoder_names else list(target_modules)
            shape = LoraConfig(r=rank, lora_alpha=rank, target_modules=where, init_lora_weights="gaussian")
            inject_adapter_in_model(shape, backbone.module, name)  # not every network of diffusers has `add_adapter`
