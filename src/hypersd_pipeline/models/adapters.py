"""Several LoRA adapters on one frozen UNet: student, EMA target and, where needed, the previous stage."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.diffusion.sampling import Denoiser
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.folded import can_fold, folded
from hypersd_pipeline.models.lora import PREFIX, LoRA

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


class AdaptedUNet:
    """One UNet in memory, seen through the base weights or through any of its adapters.

    The base is frozen. Only the adapters named in ``trainable`` require gradients; they are kept in float32.

    Args:
        unet: loaded, frozen; changed in place.
        rank: of every adapter; ``lora_alpha`` equals it, so that the scale is 1.
        target_modules: module-name endings, as peft matches them.
        names: the adapters.
        trainable: those that are trained.
        start: weights for ``names``; otherwise A is random (seeded) and B zero, the same for all.
        fresh_names: further adapters that start at zero, whatever ``start`` is (a critic).
        encoder_names: further adapters that sit in the down blocks and the mid block only and start at zero, whatever ``start`` is.

    Raises:
        UserError: no module matches ``target_modules``, or ``start`` has another rank or other modules.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        *,
        rank: int,
        target_modules: Sequence[str],
        names: Sequence[str] = ("student", "ema"),
        trainable: Sequence[str] = ("student",),
        start: LoRA | None = None,
        fresh_names: Sequence[str] = (),
        encoder_names: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        from peft import LoraConfig
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.unet = unet
        self.names = (*names, *fresh_names, *encoder_names)
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(target_modules), init_lora_weights="gaussian")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                _add_adapter(unet, config, self.names[0])
            except ValueError as error:
                raise UserError(
                    f"lora.target_modules: {list(target_modules)} match no module of the UNet; use names such as to_q, to_v."
                ) from error
            for name in (*names[1:], *fresh_names):
                _add_adapter(unet, config, name)
            if encoder_names:
                endings = "|".join(re.escape(ending) for ending in target_modules)
                part = LoraConfig(
                    r=rank,
                    lora_alpha=rank,
                    target_modules=rf"(down_blocks|mid_block)\.(.*\.)?({endings})",
                    init_lora_weights="gaussian",
                )
                for name in encoder_names:
                    _add_adapter(unet, part, name)
        for parameter in (p for name, p in unet.named_parameters() if ".lora_" in name):
            parameter.data = parameter.data.float()  # in bf16 an update of 1e-6 would round away
        # collected once: walking the module tree at each switch would cost more than the switch
        self._layers: list[Any] = [m for m in unet.modules() if isinstance(m, BaseTunerLayer)]
        self.dtype: torch.dtype = next(p.dtype for name, p in unet.named_parameters() if ".lora_" not in name)
        for layer in self._layers:
            layer.forward = partial(_forward, layer, layer.forward)
        self._layer_names = [name for name, m in unet.named_modules() if isinstance(m, BaseTunerLayer)]
        if start is not None:
            self._load(self.names[0], start, rank)
        for name in names[1:]:
            for target, source in zip(self.parameters(name), self.parameters(self.names[0]), strict=True):
                target.data.copy_(source.data)
        for parameter in unet.parameters():
            parameter.requires_grad_(False)
        for name in trainable:
            for parameter in self.parameters(name):
                parameter.requires_grad_(True)
        self.use(None)

    def use(self, name: str | None) -> None:
        """Make the UNet compute with this adapter; None is the base alone.

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
            return self.unet(x_t.to(self.dtype), t, **cond.to(dtype=self.dtype).unet_kwargs(), return_dict=False)[0]

        return call

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
            tensors[f"{PREFIX}{module}.lora_A.weight"] = a.detach().float().cpu().clone()
            tensors[f"{PREFIX}{module}.lora_B.weight"] = b.detach().float().cpu().clone()
        return LoRA(tensors, metadata)

    def _load(self, name: str, lora: LoRA, rank: int) -> None:
        given = lora.modules()
        if lora.rank != rank:
            raise UserError(
                f"lora.rank: {rank} differs from the previous stage's LoRA, which has rank {lora.rank}; use one rank in all stages."
            )
        if set(given) != set(self._layer_names):
            odd = sorted(set(given) ^ set(self._layer_names))[0]
            raise UserError(
                f"lora.target_modules: the previous stage's LoRA has other modules ({odd} is in one only); use one list in all stages."
            )
        for module, a, b in self._pairs(name):
            a.data.copy_(given[module][0])
            b.data.copy_(given[module][1])

    def state_dict(self) -> dict[str, Any]:
        """All adapters, for a checkpoint."""
        return {name: [p.detach() for p in self.parameters(name)] for name in self.names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        for name in self.names:
            for parameter, saved in zip(self.parameters(name), state_dict[name], strict=True):
                parameter.data.copy_(saved)


def checkpoint_gradients(unet: UNet2DConditionModel) -> None:
    """Less memory for one more forward pass. diffusers does it only in training mode; Stable Diffusion UNets have no dropout."""
    unet.enable_gradient_checkpointing()
    unet.train()


def _forward(layer: Any, unfolded: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A LoRA layer's forward pass: one product where the sum ``W + B A`` is exact enough, peft's own otherwise."""
    if layer._disable_adapters:
        return layer.base_layer(x)  # type: ignore[no-any-return]
    name = layer._active_adapter[0]
    if name not in layer.lora_A:  # the discriminator's adapter sits in a part of the UNet only
        return layer.base_layer(x)  # type: ignore[no-any-return]
    if not can_fold(layer, x):
        return unfolded(x)
    return folded(layer, x, layer.lora_A[name].weight, layer.lora_B[name].weight)


def _add_adapter(unet: UNet2DConditionModel, config: Any, name: str) -> None:
    with warnings.catch_warnings():  # peft warns that a model with a second adapter has several, which is what we want
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        unet.add_adapter(config, adapter_name=name)
