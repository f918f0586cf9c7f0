"""What the project has to know of a network, whatever its family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.config_rules import check_class, read_config

COMPILED = 64
"""Compiled passes of one network, at most: adapters, shapes of batches, with and without a graph."""


class ExactConv2d(nn.Conv2d):
    """A convolution in float32, under autocast too."""

    def forward(self, x: Tensor) -> Tensor:
        """``[b, c, h, w]`` in any floating dtype -> float32."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


class ExactGroupNorm(nn.GroupNorm):
    """A group normalisation in float32, under autocast too."""

    def forward(self, x: Tensor) -> Tensor:
        """``[b, c, h, w]`` in any floating dtype -> float32."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


def exact(*modules: nn.Module) -> None:
    """Make convolutions and group normalisations compute in float32, with float32 weights. Names and values of weights stay."""
    kinds: dict[type, type] = {nn.Conv2d: ExactConv2d, nn.GroupNorm: ExactGroupNorm}
    for module in modules:
        if type(module) in kinds:
            module.__class__ = kinds[type(module)]
            module.float()


class Backbone(ABC):
    """A denoising network of diffusers.

    Another family is another subclass. Nothing outside this folder may know the names of a network's parts.

    Attributes:
        component: the network's name in diffusers' pipelines, which is its folder and the prefix of its LoRA keys.
        class_name: of the diffusers class that loads it.
        size_key: of its ``config.json``, the side of the latents that it was trained for.
        encoder_modules: a regular expression of the module names that `features` runs through.
        input_names: what diffusers calls the inputs ``x_t``, ``t``, ``prompt_embeds``, ``pooled`` and ``sizes``, in this order.
        module: the network itself. call: the same as a family calls it, which may be compiled.
        dtype: of its weights.
    """

    component: ClassVar[str]
    class_name: ClassVar[str]
    size_key: ClassVar[str]
    encoder_modules: ClassVar[str]
    input_names: ClassVar[tuple[str, ...]]

    def __init__(self, module: Any) -> None:
        self.module: Any = module
        self.call: Any = module
        self.dtype: torch.dtype = next(p.dtype for name, p in module.named_parameters() if ".lora_" not in name)
        exact(*self.exact_modules())

    def exact_modules(self) -> Sequence[nn.Module]:
        """Convolutions and group normalisations that compute in float32, whatever the rest does (see `exact`)."""
        return ()

    def hold_in(self, dtype: torch.dtype) -> None:
        """From now on hold the weights in another dtype, in which autocast computes. Then no pass has to cast them.

        Normalisations stay in float32, and so do `exact_modules`: autocast computes the former in float32 on a GPU. Whatever is to be
        merged into the weights is merged before: bfloat16 would round it away.
        """
        kept = {id(module) for module in self.exact_modules()}
        for module in self.module.modules():
            if id(module) not in kept and not isinstance(module, nn.GroupNorm | nn.LayerNorm):
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(dtype)
        self.dtype = dtype

    def lay_out_channels_last(self) -> None:
        """Hold the weights of convolutions with the channels last. Images inside follow, which tensor cores are faster with."""
        self.module.to(memory_format=torch.channels_last)

    def compile(self, backend: Any = "inductor") -> None:
        """Compile whole passes, each adapter and each shape by itself, when it is first called.

        What says which adapter is in use is constant in a compiled pass. So going from one adapter to another compiles nothing anew.

        Args:
            backend: of ``torch.compile``.
        """
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED)  # type: ignore[attr-defined]
        self.call = torch.compile(self.module, backend=backend, dynamic=False)

    @abstractmethod
    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The raw output ``[b, c, h, w]``, for inputs in any floating dtype. ``t`` is int64 ``[b]``."""

    @abstractmethod
    def features(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """What a discriminator sees: the encoder's features ``[b, C, h', w']``, by a pass through the encoder alone."""

    @abstractmethod
    def feature_shape(self, latent_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """``(C, h', w')`` of `features` for latents ``(c, h, w)``."""

    def feature_levels(self, x_t: Tensor, t: Tensor, cond: Conditioning, levels: int) -> list[Tensor]:
        """`features`, and with more than one level those of ``levels - 1`` earlier parts of the encoder, the last part first.

        Raises:
            UserError: the family has no features at so many levels.
        """
        if levels > 1:
            raise UserError(f"terms.adversarial.levels is {levels}, but {self.class_name} gives features at one level; use 1.")
        return [self.features(x_t, t, cond)]

    def feature_shapes(self, latent_shape: tuple[int, int, int], levels: int) -> list[tuple[int, int, int]]:
        """``(C, h', w')`` of each of `feature_levels`. Raises UserError as it does."""
        if levels > 1:
            raise UserError(f"terms.adversarial.levels is {levels}, but {self.class_name} gives features at one level; use 1.")
        return [self.feature_shape(latent_shape)]

    @abstractmethod
    def feature_module(self) -> nn.Module:
        """The module whose output gives `features` (by `features_of`)."""

    def features_of(self, output: Any) -> Tensor:
        """`features` from what `feature_module` puts out: where these are tokens, a family lays them out as an image."""
        return output  # type: ignore[no-any-return]

    @staticmethod
    @abstractmethod
    def latent_shape(config: Mapping[str, Any]) -> tuple[int, int | None]:
        """Channels and side of the latents that a ``config.json`` asks for. None for a side that it leaves open."""

    @contextmanager
    def watch_features(self) -> Iterator[list[Tensor]]:
        """The `features` of all whole passes made inside, in order: they come with a pass at no cost."""
        seen: list[Tensor] = []
        call, self.call = self.call, self.module  # a compiled pass knows nothing of hooks that come later
        handle = self.feature_module().register_forward_hook(lambda module, inputs, output: seen.append(self.features_of(output)))
        try:
            yield seen
        finally:
            handle.remove()
            self.call = call

    def checkpoint_gradients(self) -> None:
        """Less memory for one more forward pass. diffusers does it only in training mode. These networks have no dropout."""
        self.module.enable_gradient_checkpointing()
        self.module.train()

    @classmethod
    def check_config(cls, path: Path, latent_channels: int) -> None:
        """Check the network's ``config.json``.

        Args:
            latent_channels: of the VAE.

        Raises:
            UserError: a key is missing, or has a value that cannot be meant.
        """
        check_class(path, read_config(path), cls.class_name)

    @classmethod  # noqa: B027  # most families have nothing to check
    def check_widths(cls, path: Path, layout: str, encoders: Sequence[Mapping[str, Any]]) -> None:
        """Check that the network of a ``config.json`` takes embeddings of the width that the text encoders give.

        Args:
            layout: see `Teacher`. encoders: configurations of the text encoders.

        Raises:
            UserError: it takes others.
        """

    def read_lora_pairs(self, file: Path) -> dict[str, tuple[Tensor, Tensor]]:
        """Module name -> float32 ``(A, B)`` of a LoRA in any layout that diffusers reads for this family, with the scale in B.

        Raises:
            UserError: this family has no reader, or the file is not for this network.
        """
        raise UserError(f"LoRAs of other programs cannot be read for {self.class_name}; start from the teacher.")

    def kohya_name(self, module: str) -> str:
        """The name that sd-scripts, ComfyUI and A1111 give a module, with dots.

        Args:
            module: its name in diffusers.

        Raises:
            UserError: these programs have no names for this family.
        """
        raise UserError(f"export.formats: kohya's layout has no names for {self.class_name}; leave kohya out.")

    def check_targets(self, target_modules: Iterable[str]) -> None:
        """Check the module-name endings of a LoRA, as peft matches them.

        Raises:
            UserError: none of them matches a module.
        """
        targets = list(target_modules)
        names = [name for name, _ in self.module.named_modules()]
        if not any(name == target or name.endswith(f".{target}") for name in names for target in targets):
            raise UserError(f"lora.target_modules: {targets} match no module of the network; use names such as to_q, to_v.")
