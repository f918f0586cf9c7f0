"""The public configurations of Stable Diffusion 1.5 and XL: their networks without weights, and teachers of them with random weights."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.files import write_text
from hypersd_pipeline.models.teacher import SHIPPED, TeacherConfig

Layout = Literal["sd15", "sdxl"]
FOLDER = Path(__file__).parents[1] / "assets" / "networks"
TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut",
    "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip
"""What the released LoRAs change."""


@cache
def public(layout: Layout) -> Mapping[str, Any]:
    """What is published of a model: ``ids`` on the hub, ``networks`` (class and config), ``tokenizers``, ``scheduler``."""
    return json.loads((FOLDER / f"{layout}.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def description(config: TeacherConfig) -> Mapping[str, Any]:
    """The teacher's architecture, in the form of `public`, without its weights. Nothing is downloaded.

    Raises:
        UserError: it is on the hub, and neither its id nor ``teacher.layout`` says which model it is.
    """
    folder = SHIPPED if config.source == "shipped" else Path(config.source).expanduser()
    if folder.is_dir():
        return _of_folder(folder)
    layouts: tuple[Layout, ...] = ("sd15", "sdxl")
    known: list[Layout] = [layout for layout in layouts if config.layout == layout or config.source in public(layout)["ids"]]
    if not known:
        raise UserError(
            f"teacher.source: {config.source} is no folder, and its architecture is not known here; set teacher.layout to sd15 or sdxl if "
            "it has the architecture of that model, or give a folder."
        )
    return public(known[0])


def _of_folder(folder: Path) -> Mapping[str, Any]:
    def read(name: str) -> dict[str, Any]:
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing; give a folder that a pipeline's save_pretrained wrote.")
        return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]

    index = read("model_index.json")
    parts = {name: value for name, value in index.items() if isinstance(value, list) and value[0]}
    networks = {
        name: {"class": parts[name], "config": read(f"{name}/config.json")}
        for name in ("unet", "transformer", "vae", "text_encoder", "text_encoder_2")
        if name in parts
    }
    return {
        "pipeline": {name: value for name, value in index.items() if not isinstance(value, list)},
        "networks": networks,
        "tokenizers": {name: folder / name for name in ("tokenizer", "tokenizer_2") if name in parts},
        "scheduler": read("scheduler/scheduler_config.json"),
    }


def build(network: Mapping[str, Any]) -> Any:
    """One of a description's ``networks``, with the weights that its class starts with, where PyTorch's default device is."""
    import diffusers
    import transformers

    library, name = network["class"]
    config = {key: value for key, value in network["config"].items() if not key.startswith("_")}
    kind = getattr({"diffusers": diffusers, "transformers": transformers}[library], name)
    return kind(kind.config_class(**config)) if library == "transformers" else kind.from_config(config)


def count(network: Mapping[str, Any]) -> int:
    """Its number of parameters, of the network built without memory."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(network).parameters())


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """What is built inside has this type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def write_random_teacher(folder: Path, told: Mapping[str, Any], variant: str | None, seed: int = 0) -> None:
    """Write a diffusers folder of the described architecture with random weights, one network in memory at a time.

    Args:
        told: see `description`. variant: as the teacher's. ``fp16`` writes weights in float16 under that name, as the hub has them.
    """
    import transformers

    transformers.logging.disable_progress_bar()
    index: dict[str, Any] = {**told["pipeline"], "scheduler": ["diffusers", told["scheduler"]["_class_name"]]}
    for name, network in told["networks"].items():
        index[name] = list(network["class"])
        with torch.random.fork_rng(devices=[]), default_dtype(torch.float16 if variant == "fp16" else torch.float32):
            torch.manual_seed(seed)
            model = build(network)
            model.save_pretrained(folder / name, safe_serialization=True, variant=variant, max_shard_size="2GB")
        del model
        gc.collect()
    for name, pad in told["tokenizers"].items():
        index[name] = ["transformers", "CLIPTokenizer"]
        write_tokenizer(folder / name, pad)
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    write_text(folder / "scheduler" / "scheduler_config.json", json.dumps(told["scheduler"], indent=2) + "\n")
    write_text(folder / "model_index.json", json.dumps(index, indent=2) + "\n")


def write_tokenizer(folder: Path, pad: str | Path) -> None:
    """CLIP's tokenizer, with the vocabulary that open_clip carries.

    Args:
        pad: the token that fills up, in which the two of SDXL differ. Or the folder of a tokenizer, which is copied.
    """
    import shutil

    if isinstance(pad, Path):
        shutil.copytree(pad, folder, dirs_exist_ok=True)
        return
    import open_clip

    clip = open_clip.SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    merges = sorted(clip.bpe_ranks, key=clip.bpe_ranks.__getitem__)
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": pad}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **special}
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "vocab.json", json.dumps({names.get(token, token): number for token, number in clip.encoder.items()}))
    write_text(folder / "merges.txt", "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    write_text(folder / "tokenizer_config.json", json.dumps(config))
    write_text(folder / "special_tokens_map.json", json.dumps(special))
