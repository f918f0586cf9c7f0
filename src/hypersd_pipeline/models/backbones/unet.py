"""Stable Diffusion's UNet, of 1.5 and of XL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.backbones.base import Backbone
from hypersd_pipeline.models.config_rules import (
    DEPTH,
    SIDE,
    WIDTH,
    WIDTHS,
    check_class,
    either,
    list_of,
    need,
    none,
    read_config,
    text,
    whole,
)


class UNetBackbone(Backbone):
    """diffusers' ``UNet2DConditionModel``."""

    component = "unet"
    class_name = "UNet2DConditionModel"
    size_key = "sample_size"
    encoder_modules = "(down_blocks|mid_block)"
    input_names = ("sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids")

    def exact_modules(self) -> Sequence[nn.Module]:
        """See `Backbone`. The last two: rounded to bf16, eps would be multiplied by 14.6 on the way to x0."""
        return self.module.conv_norm_out, self.module.conv_out

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """See `Backbone`."""
        return self.call(x_t.to(self.dtype), t, **call_arguments(self._rounded(cond)), return_dict=False)[0]  # type: ignore[no-any-return]

    def _rounded(self, cond: Conditioning) -> Conditioning:
        """In the network's dtype. Sizes stay as they are: bfloat16 would make 1368 of 1365, and their embedding is made in float32."""
        rounded = cond.to(dtype=self.dtype)
        return Conditioning(rounded.prompt_embeds, rounded.pooled, cond.sizes)

    def features(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The output of the mid block: what the whole pass computes there, without the decoder (SDXL-Lightning, section 3.2)."""
        return self.feature_levels(x_t, t, cond, 1)[0]

    def feature_levels(self, x_t: Tensor, t: Tensor, cond: Conditioning, levels: int) -> list[Tensor]:
        """See `Backbone`. The mid block's output, then the blocks' before it, from the last to the first."""
        unet, x = self.module, x_t.to(self.dtype)
        inputs = call_arguments(self._rounded(cond))
        text, added = inputs["encoder_hidden_states"], inputs.get("added_cond_kwargs", {})
        emb = unet.time_embedding(unet.get_time_embed(sample=x, timestep=t))
        extra = unet.get_aug_embed(emb=emb, encoder_hidden_states=text, added_cond_kwargs=added)
        emb = emb if extra is None else emb + extra
        x, seen = unet.conv_in(x), []
        for block in unet.down_blocks:
            crossed = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
            x, _ = block(hidden_states=x, temb=emb, **crossed)
            seen.append(x)
        return [unet.mid_block(x, emb, encoder_hidden_states=text), *seen[:-levels:-1]]

    def feature_shape(self, latent_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """See `Backbone`. Each block but the last halves the sides, rounded up."""
        _, height, width = latent_shape
        for block in self.module.down_blocks:
            if block.downsamplers is not None:
                height, width = (height + 1) // 2, (width + 1) // 2
        return self.module.config.block_out_channels[-1], height, width

    def feature_shapes(self, latent_shape: tuple[int, int, int], levels: int) -> list[tuple[int, int, int]]:
        """See `Backbone`."""
        blocks = self.module.down_blocks
        if levels > 1 + len(blocks):
            raise UserError(f"terms.adversarial.levels is {levels}, but the teacher's encoder has {1 + len(blocks)} levels; lower it.")
        _, height, width = latent_shape
        shapes = []
        for block, channels in zip(blocks, self.module.config.block_out_channels, strict=True):
            if block.downsamplers is not None:
                height, width = (height + 1) // 2, (width + 1) // 2
            shapes.append((channels, height, width))
        return [self.feature_shape(latent_shape), *shapes[:-levels:-1]]

    def feature_module(self) -> nn.Module:
        """The mid block."""
        return self.module.mid_block  # type: ignore[no-any-return]

    @staticmethod
    def latent_shape(config: Mapping[str, Any]) -> tuple[int, int | None]:
        """See `Backbone`. Some configurations have a height and a width, which must be equal.

        Raises:
            UserError: they are not.
        """
        side = config.get("sample_size")
        if isinstance(side, list | tuple):
            if len(set(side)) != 1:
                raise UserError(f"unet/config.json: sample_size is {side}, and only square images are supported; use another teacher.")
            side = side[0]
        return int(config.get("in_channels", 4)), None if side is None else int(side)

    @classmethod
    def check_config(cls, path: Path, latent_channels: int) -> None:
        """See `Backbone`."""
        config = read_config(path)
        check_class(path, config, cls.class_name)
        square = "a side of latents, a pair of equal sides, or null"
        depths = either(DEPTH, list_of(either(DEPTH, list_of(DEPTH))))
        need(
            path,
            config,
            {"cross_attention_dim": (either(WIDTH, WIDTHS), "a width"), "block_out_channels": (WIDTHS, "a list of widths")},
            {
                "sample_size": (either(none, SIDE, list_of(SIDE, 2, 2)), square),
                "in_channels": (WIDTH, "a number of channels"),
                "out_channels": (WIDTH, "a number of channels"),
                "layers_per_block": (either(whole(1, 16), list_of(whole(1, 16))), "a number of layers from 1 to 16"),
                "transformer_layers_per_block": (depths, "a number of layers for each block"),
                "attention_head_dim": (either(none, WIDTH, WIDTHS), "a width or a width for each block"),
                "num_attention_heads": (either(none, WIDTH, WIDTHS), "a number of heads"),
                "norm_num_groups": (either(none, WIDTH), "a number of groups"),
                "down_block_types": (list_of(text), "a list of names"),
                "up_block_types": (list_of(text), "a list of names"),
            },
        )
        channels = config.get("in_channels", 4), config.get("out_channels", 4)
        if channels[0] != channels[1] and channels[0] == latent_channels:
            raise UserError(f"{path}: out_channels is {channels[1]}, but in_channels is {channels[0]}; use a teacher where they are equal.")

    @classmethod
    def check_widths(cls, path: Path, layout: str, encoders: Sequence[Mapping[str, Any]]) -> None:
        """See `Backbone`."""
        network = read_config(path)
        widths = [config["hidden_size"] for config in encoders]
        if isinstance(network["cross_attention_dim"], int) and network["cross_attention_dim"] != sum(widths):
            raise UserError(
                f"{path}: cross_attention_dim is {network['cross_attention_dim']}, but the text encoders' hidden_size is "
                f"{' + '.join(map(str, widths))}; give a folder whose parts belong together."
            )
        if layout == "sdxl":
            each, whole = network.get("addition_time_embed_dim"), network.get("projection_class_embeddings_input_dim")
            if network.get("addition_embed_type") != "text_time" or each is None or not WIDTH(each) or not WIDTH(whole):
                raise UserError(f"{path}: addition_embed_type and its sizes are not SDXL's; give a complete SDXL teacher.")
            pooled = encoders[1].get("projection_dim", 512)
            if whole != 6 * each + pooled:
                raise UserError(
                    f"{path}: projection_class_embeddings_input_dim is {whole}, not 6 x {each} + {pooled}, the projection_dim of "
                    f"text_encoder_2; give a folder whose parts belong together."
                )

    def kohya_name(self, module: str) -> str:
        """See `Backbone`. For 1.5 these are diffusers' names. For XL sd-scripts has the names of Stability AI's code."""
        return sgm_name(module, self.module.config) if self.module.config.addition_embed_type == "text_time" else module

    def read_lora_pairs(self, file: Path) -> dict[str, tuple[Tensor, Tensor]]:
        """See `Backbone`. diffusers itself loads the file into an empty copy of the network, which then says what it computes."""
        from accelerate import init_empty_weights
        from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin
        from peft.tuners.tuners_utils import BaseTunerLayer

        is_xl = self.module.config.addition_embed_type == "text_time"
        loader = StableDiffusionXLLoraLoaderMixin if is_xl else StableDiffusionLoraLoaderMixin
        more = {"unet_config": self.module.config} if is_xl else {}  # to number kohya's blocks, which for 1.5 have diffusers' names
        with init_empty_weights():
            empty = type(self.module).from_config(self.module.config)
        empty.to_empty(device="cpu")  # its own weights are never written, so that they take no memory
        try:
            state, alphas, told = loader.lora_state_dict(
                str(file), use_safetensors=True, local_files_only=True, return_lora_metadata=True, **more
            )
            loader.load_lora_into_unet(state, alphas, empty, adapter_name="start", metadata=told)
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            raise UserError(f"diffusers cannot load it as a LoRA of this network ({' '.join(str(error).split())[:200]}).") from error
        layers: dict[str, Any] = {name: layer for name, layer in empty.named_modules() if isinstance(layer, BaseTunerLayer)}
        pairs = {
            name: (layer.lora_A["start"].weight.detach().float(), layer.lora_B["start"].weight.detach().float() * layer.scaling["start"])
            for name, layer in layers.items()
            if "start" in layer.lora_A
        }
        given = sum(key.endswith((".lora_A.weight", ".lora.down.weight", ".down.weight", "lora_down.weight")) for key in state)
        if not pairs or given != len(pairs):
            raise UserError(f"of its {given} modules {len(pairs)} are in this network; use a LoRA of the same family as the teacher.")
        return pairs


_OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}


def sgm_name(module: str, config: Any) -> str:
    """The name of a UNet's module in Stability AI's code (sgm), which numbers all blocks of a half in one row.

    diffusers has the way back only: `convert_ldm_unet_checkpoint`.

    Args:
        module: its name in diffusers. config: of the network.

    Raises:
        UserError: the blocks have numbers of layers that differ, or the module is none that a LoRA changes.
    """
    if module in _OUTSIDE_BLOCKS:
        return _OUTSIDE_BLOCKS[module]
    layers = config.layers_per_block
    if not isinstance(layers, int):
        raise UserError(f"export.formats: kohya's layout has no names for blocks with {layers} layers; leave kohya out.")
    part, *place, kind, index, inner = _split(module)
    if part == "mid_block":
        return f"middle_block.1.{inner}" if kind == "attentions" else f"middle_block.{2 * int(index)}.{_RESNET[inner]}"
    block, down = int(place[0]), part == "down_blocks"
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * (layers + 1)}.0.op"
    if kind == "upsamplers":
        attends = "CrossAttn" in config.up_block_types[block]
        return f"output_blocks.{block * (layers + 1) + layers}.{2 if attends else 1}.conv"
    number = block * (layers + 1) + int(index) + (1 if down else 0)
    row = "input_blocks" if down else "output_blocks"
    return f"{row}.{number}.1.{inner}" if kind == "attentions" else f"{row}.{number}.0.{_RESNET[inner]}"


def _split(module: str) -> list[str]:
    """``down_blocks.0.resnets.1.conv1`` -> ``["down_blocks", "0", "resnets", "1", "conv1"]``. The mid block has no number."""
    head = module.split(".", 3 if module.startswith("mid_block.") else 4)
    kinds = ("resnets", "attentions", "downsamplers", "upsamplers")
    if len(head) < 4 or head[-3] not in kinds or (head[-3] == "resnets" and head[-1] not in _RESNET):
        raise UserError(f"export.formats: kohya's layout has no name for the module {module!r}; leave kohya out.")
    return head


def call_arguments(cond: Conditioning) -> dict[str, Any]:
    """Keyword arguments of ``UNet2DConditionModel.forward``. SDXL calls the size conditioning ``time_ids``."""
    arguments: dict[str, Any] = {"encoder_hidden_states": cond.prompt_embeds}
    if cond.pooled is not None:
        arguments["added_cond_kwargs"] = {"text_embeds": cond.pooled, "time_ids": cond.sizes}
    return arguments


def small_unet(
    *, latent_channels: int, latent_size: int, text_width: int, block_out_channels: tuple[int, ...], layers_per_block: int,
    attention_head_dim: int, norm_num_groups: int,
) -> Any:  # fmt: skip
    """A randomly initialised UNet in Stable Diffusion 1.5's layout, with attention in every block."""
    from diffusers import UNet2DConditionModel

    levels = len(block_out_channels)
    return UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        cross_attention_dim=text_width,
        block_out_channels=block_out_channels,
        layers_per_block=layers_per_block,
        attention_head_dim=attention_head_dim,
        norm_num_groups=norm_num_groups,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
    )
