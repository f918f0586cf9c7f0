"""Every key of kohya's layout is known to ComfyUI, A1111 and sd-scripts, for the real Stable Diffusion 1.5 and XL.

Their rules are written here from what these programs document and publish, and share no code with the package. The modules of the original
network (Stability AI's code, ``sgm``) are listed from its construction: so many levels, so many layers, so deep a transformer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import unets
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.export.kohya import to_kohya
from hypersd_pipeline.files import write_tensors
from hypersd_pipeline.models.backbones import UNetBackbone
from hypersd_pipeline.models.backbones.unet import sgm_name
from hypersd_pipeline.models.lora import LoRA
from hypersd_pipeline.models.user_lora import read_user_lora

RANK = 64
LAYOUTS = {"sd15": unets.SD15, "sdxl": unets.SDXL}
MODULES = {"sd15": 278, "sdxl": 788}
# Channels of each level as multiples of 320, and the depth of the transformers there. From v1-inference.yaml and sd_xl_base.yaml.
LEVELS = {"sd15": ((1, 2, 4, 4), (1, 1, 1, 0), 1), "sdxl": ((1, 2, 4), (0, 2, 10), 10)}


# --- the original network ----------------------------------------------------------------------------------------------------------------


def resnet(place: str, widens: bool) -> list[str]:
    return [f"{place}.{part}" for part in ("in_layers.2", "emb_layers.1", "out_layers.3", *(["skip_connection"] if widens else []))]


def transformer(place: str, depth: int) -> list[str]:
    parts = [f"attn{n}.{part}" for n in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")] + ["ff.net.0.proj", "ff.net.2"]
    return [f"{place}.proj_in", f"{place}.proj_out", *(f"{place}.transformer_blocks.{d}.{part}" for d in range(depth) for part in parts)]


def original_modules(layout: str) -> Iterator[str]:
    """Each convolution and linear layer of the original network inside its blocks, two residual layers a level."""
    widths, depths, middle = LEVELS[layout]
    number, width, skipped = 1, widths[0], [widths[0]]
    for level, (new, depth) in enumerate(zip(widths, depths, strict=True)):
        for _ in range(2):
            yield from resnet(f"input_blocks.{number}.0", width != new)
            yield from transformer(f"input_blocks.{number}.1", depth) if depth else []
            number, width = number + 1, new
            skipped.append(width)
        if level < len(widths) - 1:
            yield f"input_blocks.{number}.0.op"
            number += 1
            skipped.append(width)
    yield from [*resnet("middle_block.0", False), *transformer("middle_block.1", middle), *resnet("middle_block.2", False)]
    number = 0
    for level in reversed(range(len(widths))):
        for layer in range(3):
            yield from resnet(f"output_blocks.{number}.0", width + skipped.pop() != widths[level])
            yield from transformer(f"output_blocks.{number}.1", depths[level]) if depths[level] else []
            if level and layer == 2:
                yield f"output_blocks.{number}.{2 if depths[level] else 1}.conv"
            number, width = number + 1, widths[level]


def flat(name: str) -> str:
    return name.replace(".", "_")


# --- the three programs ------------------------------------------------------------------------------------------------------------------


def comfyui(layout: str, network: Any) -> Callable[[str], bool]:
    """ComfyUI takes the original name and diffusers' name, each with underscores and behind ``lora_unet_``."""
    known = {flat(name) for name in (*original_modules(layout), *(name for name, _ in network.named_modules()))}
    return lambda stem: stem.removeprefix("lora_unet_") in known


_A1111_RESNET = {"conv1": "in_layers_2", "conv2": "out_layers_3", "time_emb_proj": "emb_layers_1", "conv_shortcut": "skip_connection"}


def a1111_name(stem: str) -> str:
    """A1111 translates diffusers' names by fixed numbers, three layers a block, and takes any other name as the original one."""
    found = re.fullmatch(
        r"lora_unet_(down_blocks|mid_block|up_blocks)_(?:(\d+)_)?(resnets|attentions|downsamplers|upsamplers)_(\d+)_(.+)", stem
    )
    if found is None:
        return stem.replace("lora_unet_", "")
    half, block, kind, index, inner = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    inner = _A1111_RESNET[inner] if kind == "resnets" else inner
    if half == "mid_block":
        return f"middle_block_1_{inner}" if kind == "attentions" else f"middle_block_{2 * index}_{inner}"
    if kind == "downsamplers":
        return f"input_blocks_{3 + 3 * block}_0_op"
    if kind == "upsamplers":
        return f"output_blocks_{2 + 3 * block}_{2 if block else 1}_conv"
    number = 3 * block + index + (1 if half == "down_blocks" else 0)
    return f"{'input' if half == 'down_blocks' else 'output'}_blocks_{number}_{1 if kind == 'attentions' else 0}_{inner}"


def a1111(layout: str, network: Any) -> Callable[[str], bool]:
    known = {flat(name) for name in original_modules(layout)}
    return lambda stem: a1111_name(stem) in known


def sd_scripts(layout: str, network: Any) -> Callable[[str], bool]:
    """sd-scripts trains 1.5 on diffusers' network and XL on the original one, in the layers of these four kinds of modules."""
    kinds = ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D")
    parts = [(name, part) for name, part in network.named_modules() if type(part).__name__ in kinds]
    layers = (torch.nn.Linear, torch.nn.Conv2d)
    mine = {f"{name}.{inner}" for name, part in parts for inner, layer in part.named_modules() if isinstance(layer, layers)}
    known = {flat(name) for name in (mine if layout == "sd15" else original_modules(layout))}
    return lambda stem: stem.removeprefix("lora_unet_") in known


# --- tests -------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=LAYOUTS)
def real(request) -> SimpleNamespace:
    """The real network without memory, and a LoRA on what the released ones change, in kohya's layout."""
    layout = request.param
    with torch.device("meta"):
        network = UNet2DConditionModel(**LAYOUTS[layout])
        tensors = {}
        for name, layer in network.named_modules():
            if name.endswith(unets.TARGETS) and hasattr(layer, "weight"):
                rows, *columns = layer.weight.shape
                tensors[f"unet.{name}.lora_A.weight"] = torch.empty(RANK, *columns)
                tensors[f"unet.{name}.lora_B.weight"] = torch.empty(rows, RANK, *(1 for _ in columns[1:]))
    lora = LoRA(tensors)
    return SimpleNamespace(layout=layout, network=network, lora=lora, kohya=to_kohya(lora, UNetBackbone(network)))


def test_the_list_of_the_original_network_is_complete(real):
    listed = list(original_modules(real.layout))
    assert len(listed) == len(set(listed)) == MODULES[real.layout] == len(real.lora.modules())


@pytest.mark.parametrize("program", [comfyui, a1111, sd_scripts])
def test_each_program_knows_every_key(real, program):
    stems = {key.partition(".")[0] for key in real.kohya}
    knows = program(real.layout, real.network)
    assert len(stems) == MODULES[real.layout] and [stem for stem in stems if not knows(stem)] == []


@pytest.mark.parametrize("program", [comfyui, a1111, sd_scripts])
def test_each_program_refuses_the_keys_of_a_stage(real, program):
    """The check can fail: PEFT's names, with which a stage writes, are not among those of kohya's layout."""
    knows = program(real.layout, real.network)
    assert not any(knows(flat(name).replace("unet", "lora_unet_unet")) for name in real.lora.tensors)


def test_diffusers_names_are_not_enough_for_sdxl(real):
    """Why XL gets the original names: what the converter alone writes is unknown to sd-scripts, and in part to A1111."""
    stems = [f"lora_unet_{flat(name)}" for name in real.lora.modules()]
    knows = {program.__name__: program(real.layout, real.network) for program in (a1111, sd_scripts)}
    unknown = {name: sum(not known(stem) for stem in stems) for name, known in knows.items()}
    assert unknown == ({"a1111": 0, "sd_scripts": 0} if real.layout == "sd15" else {"a1111": 1, "sd_scripts": 788})


def test_each_module_has_both_halves_and_its_rank_as_alpha(real):
    modules = {key.partition(".")[0] for key in real.kohya}
    assert set(real.kohya) == {f"{name}.{part}" for name in modules for part in ("lora_down.weight", "lora_up.weight", "alpha")}
    assert all(float(tensor) == RANK for key, tensor in real.kohya.items() if key.endswith(".alpha"))
    assert {tensor.dtype for tensor in real.kohya.values()} == {torch.float32}


def test_original_names_are_those_that_diffusers_reads_back(real):
    """diffusers' own converter of checkpoints, from the original names to its names."""
    names = [name.removesuffix(".weight") for name, _ in real.network.named_parameters() if name.endswith(".weight")]
    inside = [name for name in names if name in real.lora.modules()]
    outside = [name for name in names if name.split(".")[0] in ("conv_in", "conv_out", "time_embedding", "add_embedding")]
    marks = {name: torch.tensor(float(n)) for n, name in enumerate([*inside, *outside])}
    config = real.network.config
    given = {f"model.diffusion_model.{sgm_name(name, config)}.{kind}": mark for name, mark in marks.items() for kind in ("weight", "bias")}
    given |= {f"model.diffusion_model.out.0.{kind}": torch.tensor(-1.0) for kind in ("weight", "bias")}
    found = convert_ldm_unet_checkpoint(given, dict(config))
    assert {name: float(found[f"{name}.weight"]) for name in marks} == {name: float(mark) for name, mark in marks.items()}


def test_diffusers_reads_every_module_of_the_real_networks_back(real, tmp_path):
    generator = torch.Generator().manual_seed(0)
    small = {
        name: (torch.randn(1, *a.shape[1:], generator=generator), torch.ones(len(b), 1, *b.shape[2:]))
        for name, (a, b) in real.lora.modules().items()
    }
    lora = LoRA(
        {f"unet.{name}.lora_{half}.weight": tensor for name, pair in small.items() for half, tensor in zip("AB", pair, strict=True)}
    )
    backbone = UNetBackbone(real.network)
    write_tensors(tmp_path / "x.safetensors", to_kohya(lora, backbone))
    found = read_user_lora(tmp_path / "x.safetensors", backbone)
    assert found.tensors.keys() == lora.tensors.keys() and all(torch.equal(found.tensors[k], v) for k, v in lora.tensors.items())


@pytest.mark.parametrize("module", ["down_blocks.0.resnets.0.norm1", "encoder_hid_proj", "mid_block.gates.0.x"])
def test_a_module_without_a_name_is_refused(module):
    with pytest.raises(UserError, match=rf"^export\.formats: kohya's layout has no name for the module '{module}'; leave kohya out\.$"):
        sgm_name(module, SimpleNamespace(layers_per_block=2))


def test_blocks_with_different_numbers_of_layers_are_refused():
    with pytest.raises(UserError, match=r"^export\.formats: kohya's layout has no names for blocks with \[1, 2\] layers"):
        sgm_name("down_blocks.0.resnets.0.conv1", SimpleNamespace(layers_per_block=[1, 2]))
