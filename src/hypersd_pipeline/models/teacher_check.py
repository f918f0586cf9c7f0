"""A teacher's folder, checked whole before anything is computed: configurations, tensors' names, shapes and values, tokenizers.

Networks are built on the meta device, without memory. Files are read once, a tensor at a time, and their good state is remembered.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.files import file_sha256
from hypersd_pipeline.models.backbones import Backbone, family_of
from hypersd_pipeline.models.config_rules import (
    CURE,
    DEPTH,
    WIDTH,
    WIDTHS,
    check_class,
    either,
    list_of,
    need,
    none,
    number,
    read_config,
    text,
    whole,
)
from hypersd_pipeline.models.teacher import Teacher, TeacherConfig, find_folder, part_folders, weight_files
from hypersd_pipeline.models.tensors import Shapes, check_finite, check_report, check_shapes, read_shapes, shapes_of
from hypersd_pipeline.verdicts import remembered

log = logging.getLogger(__name__)

_ADAPTER = re.compile(r"(^|\.)(base_layer|lora_[A-Za-z_]+|hada_\w+|lokr_\w+|modules_to_save)(\.|$)")
_PROMPTS = ("a red fox on the left", "two blue cats")


@dataclass(frozen=True)
class CheckedTeacher:
    """A teacher that can be used, and what stages are checked against.

    Attributes:
        teacher: without any part loaded.
        modules: names of the network's modules.
        shapes: names and shapes of its weights.
    """

    teacher: Teacher
    modules: tuple[str, ...]
    shapes: Shapes

    def check_targets(self, key: str, target_modules: tuple[str, ...]) -> None:
        """Raises UserError for an ending of a LoRA's ``target_modules`` that matches no module of the network."""
        for target in target_modules:
            if not any(name == target or name.endswith(f".{target}") for name in self.modules):
                raise UserError(f"{key}.lora.target_modules: {target!r} matches no module of the teacher's network; correct or remove it.")


def check_teacher(config: TeacherConfig) -> CheckedTeacher:
    """Check every part of a teacher; a hub teacher is downloaded whole first. A second call with the same files takes no time.

    Raises:
        UserError: a part is missing, damaged or does not fit the others. The sentence names the file and the key or tensor.
    """
    folder = find_folder(config)
    for name in ("model_index.json", "scheduler/scheduler_config.json", "vae/config.json"):
        read_config(folder / name)
    family = family_of(folder)
    _check_index(folder, family)
    _check_scheduler(folder)
    family.check_config(folder / family.component / "config.json", read_config(folder / "vae" / "config.json").get("latent_channels", 4))
    _check_vae(folder)
    encoders = _check_encoders(folder)
    try:
        teacher = Teacher(config, folder, torch.device("cpu"))
    except UserError as error:
        raise UserError(str(error) if str(folder) in str(error) or "teacher." in str(error) else f"{folder}: {error}") from error
    family.check_widths(folder / family.component / "config.json", teacher.layout, [config for _, config in encoders])
    names = [name for part in ("backbone", "vae", "text") for name in part_folders(folder, part)]  # type: ignore[arg-type]
    for name in names:
        if not (folder / name).is_dir():
            raise UserError(f"{folder / name} is missing; give a complete diffusers folder.")
        if not name.startswith("tokenizer"):
            weight_files(folder / name, config.variant)
    found = remembered(
        "teacher",
        [path for name in names for path in sorted((folder / name).iterdir()) if path.is_file()],
        [config.variant, teacher.layout, file_sha256(folder / "model_index.json")],
        lambda: _check_contents(folder, config.variant, names),
    )
    return CheckedTeacher(teacher, tuple(found["modules"]), {name: tuple(shape) for name, shape in found["shapes"].items()})


# --- configurations ----------------------------------------------------------------------------------------------------------------------


def _check_index(folder: Path, family: type[Backbone]) -> None:
    path = folder / "model_index.json"
    index = read_config(path)
    classes = {
        family.component: (family.class_name,), "vae": ("AutoencoderKL",), "scheduler": (), "text_encoder": ("CLIPTextModel",),
        "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"), "text_encoder_2": ("CLIPTextModelWithProjection",),
        "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
    }  # fmt: skip
    second = {"text_encoder_2", "tokenizer_2"}
    for name, known in classes.items():
        entry = index.get(name)
        absent = entry is None or entry == [None, None]
        if absent and name in second and all(index.get(other) in (None, [None, None]) for other in second):
            continue
        if absent:
            raise UserError(f"{path}: has no {name}; give a complete diffusers folder of a Stable Diffusion 1.5 or SDXL model.")
        if not isinstance(entry, list) or len(entry) != 2 or not all(text(item) for item in entry):
            raise UserError(f"{path}: {name} is {str(entry)[:80]!r}, not a library and a class; {CURE}.")
        if known and entry[1] not in known:
            raise UserError(f"{path}: {name} is a {entry[1]}, not a {known[0]}; use a Stable Diffusion 1.5 or SDXL teacher.")
        if not (folder / name).is_dir():
            raise UserError(f"{folder / name} is missing; give a complete diffusers folder of a Stable Diffusion 1.5 or SDXL model.")


def _check_scheduler(folder: Path) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    config = read_config(path)
    kind = config.get("_class_name")
    if kind is not None and (not text(kind) or "Flow" in kind):
        raise UserError(f"{path}: _class_name is {str(kind)[:80]!r}, not a scheduler of a diffusion model; use a Stable Diffusion teacher.")
    types = ("epsilon", "v_prediction", "sample")
    if config.get("prediction_type", "epsilon") not in types:
        raise UserError(
            f"{path}: prediction_type is {str(config['prediction_type'])[:80]!r}, none of {', '.join(types)}; use another teacher."
        )


def _check_vae(folder: Path) -> None:
    path = folder / "vae" / "config.json"
    config = read_config(path)
    check_class(path, config, "AutoencoderKL")
    need(
        path,
        config,
        {"block_out_channels": (WIDTHS, "a list of widths")},
        {
            "scaling_factor": (number(0, 1000), "a finite number above 0"),
            "latent_channels": (WIDTH, "a number of channels"),
            "in_channels": (whole(3, 3), "3"),
            "out_channels": (whole(3, 3), "3"),
            "layers_per_block": (whole(1, 16), "a number of layers from 1 to 16"),
            "norm_num_groups": (WIDTH, "a number of groups"),
            "down_block_types": (list_of(text), "a list of names"),
            "up_block_types": (list_of(text), "a list of names"),
        },
    )


def _check_encoders(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Place and configuration of each text encoder."""
    found = []
    for name in (name for name in part_folders(folder, "text") if name.startswith("text")):
        path = folder / name / "config.json"
        config = read_config(path)
        if not str(config.get("model_type", "clip")).startswith("clip"):
            raise UserError(f"{path}: model_type is {config['model_type']!r}, not CLIP's; use a Stable Diffusion 1.5 or SDXL teacher.")
        width, heads = config.get("hidden_size"), config.get("num_attention_heads")
        need(
            path,
            config,
            {"hidden_size": (WIDTH, "a width"), "num_hidden_layers": (DEPTH, "a number of layers from 1 to 128")},
            {
                "vocab_size": (whole(2, 10**7), "a number of tokens"),
                "max_position_embeddings": (whole(2, 2**16), "a number of tokens"),
                "num_attention_heads": (whole(1, 1024), "a number of heads"),
                "intermediate_size": (WIDTH, "a width"),
                "projection_dim": (either(none, WIDTH), "a width"),
                "hidden_act": (text, "the name of an activation"),
            },
        )
        if heads is not None and isinstance(width, int) and width % heads:
            raise UserError(f"{path}: hidden_size is {width}, not a multiple of the {heads} of num_attention_heads; {CURE}.")
        found.append((path, config))
    return found


# --- contents ----------------------------------------------------------------------------------------------------------------------------


def _check_contents(folder: Path, variant: str | None, names: list[str]) -> dict[str, Any]:
    """Names and shapes first, values last. Returns the names of the network's modules and the shapes of its weights."""
    log.info("Checking the teacher in %s; this is remembered", folder)
    files = {name: weight_files(folder / name, variant) for name in names if not name.startswith("tokenizer")}
    found = {name: _found_shapes(folder / name, paths, variant) for name, paths in files.items()}
    network: Any = None
    for name, paths in files.items():
        if name.startswith("text_encoder"):
            _check_encoder(folder / name, variant, paths[0])
        else:
            built = _built(folder / name, "AutoencoderKL" if name == "vae" else family_of(folder).class_name)
            check_shapes(paths[0], _current_names(found[name], built), shapes_of(lambda built=built: built), CURE)  # type: ignore[misc]
            network = network if name == "vae" else built
    for name in (name for name in names if name.startswith("tokenizer")):
        encoder = read_config(folder / name.replace("tokenizer", "text_encoder") / "config.json")
        _check_tokenizer(folder / name, encoder.get("vocab_size", 49408))
    for paths in files.values():
        for path in paths:
            check_finite(path)
    return {
        "modules": [module for module, _ in network.named_modules() if module],
        "shapes": {weight: list(tensor.shape) for weight, tensor in network.state_dict().items()},
    }


def _built(folder: Path, class_name: str) -> Any:
    """The network of a configuration, without memory for its weights."""
    import diffusers

    path = folder / "config.json"
    try:
        with torch.device("meta"):
            return getattr(diffusers, class_name).from_config(read_config(path))
    except UserError:
        raise
    except Exception as error:  # whatever sizes that do not fit each other make diffusers and torch raise
        told = " ".join(str(error).split()).rstrip(".")[:160]
        raise UserError(f"{path}: no network can be built of it ({told}); {CURE}.") from error


def _found_shapes(folder: Path, paths: list[Path], variant: str | None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a part's tensors, of all of its files. Raises UserError for an adapter's, and for shards that lack."""
    shapes: dict[str, tuple[int, ...]] = {}
    where: dict[str, Path] = {}
    for path in paths:
        for name, shape in read_shapes(path).items():
            if _ADAPTER.search(name):
                raise UserError(
                    f"{path}: holds {name}, a tensor of an adapter that was still attached when the pipeline was saved; call "
                    "unload_lora_weights() after fuse_lora(), and save it again."
                )
            if name in shapes:
                raise UserError(f"{path}: holds {name}, which {where[name].name} holds too; remove one of the files.")
            shapes[name], where[name] = shape, path
    _check_shards(folder, paths, where, variant)
    return shapes


def _check_shards(folder: Path, paths: list[Path], where: Mapping[str, Path], variant: str | None) -> None:
    numbered = [match for path in paths if (match := re.search(r"-(\d{5})-of-(\d{5})", path.name))]
    if not numbered:
        return
    missing = sorted(set(range(1, int(numbered[0][2]) + 1)) - {int(match[1]) for match in numbered})
    if missing:
        raise UserError(f"{folder}: shard {missing[0]} of {int(numbered[0][2])} is missing; fetch the teacher again.")
    indices = [path for path in sorted(folder.glob("*.index*.json")) if not variant or variant in path.name]
    if not indices:
        raise UserError(f"{folder}: has shards, but no index of them (*.safetensors.index.json); fetch the teacher again.")
    table = read_config(indices[0]).get("weight_map")
    if not isinstance(table, dict) or {name: path.name for name, path in where.items()} != table:
        raise UserError(f"{indices[0]}: is not the index of the shards beside it; fetch the teacher again.")


def _current_names(shapes: Shapes, network: Any) -> dict[str, tuple[int, ...]]:
    """The shapes under today's names: older autoencoders call the projections of their attention otherwise, as diffusers knows."""
    renamed: dict[str, Any] = dict(shapes)
    network._fix_state_dict_keys_on_load(renamed)
    return renamed


def _check_encoder(folder: Path, variant: str | None, path: Path) -> None:
    """transformers would fill what is missing with random numbers, without a word."""
    import transformers

    kind: Any = transformers.CLIPTextModelWithProjection if folder.name.endswith("_2") else transformers.CLIPTextModel
    options = {"variant": variant, "use_safetensors": True, "local_files_only": True}
    try:
        with _silent():
            _, report = kind.from_pretrained(folder, **options, device_map="meta", ignore_mismatched_sizes=True, output_loading_info=True)
    except Exception as error:  # whatever a configuration of another network makes transformers raise
        told = " ".join(str(error).split()).rstrip(".")[:160]
        raise UserError(f"{folder / 'config.json'}: no text encoder can be built of it ({told}); {CURE}.") from error
    check_report(path, report, CURE)


class _silent:
    """transformers without its bars and warnings, which the check has sentences for."""

    def __enter__(self) -> None:
        from transformers import logging as transformers_logging

        self.logging, self.before = transformers_logging, transformers_logging.get_verbosity()
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()

    def __exit__(self, *_: Any) -> None:
        self.logging.set_verbosity(self.before)


def _check_tokenizer(folder: Path, vocabulary: int) -> None:
    """Raises UserError for a tokenizer without its vocabulary or merges, and for one that does not tell prompts apart."""
    import transformers

    for name in _tokenizer_files(folder):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing; fetch the teacher again, its tokenizer files too.")
    try:
        with _silent():
            tokenizer: Any = transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            rows = [tokenizer(prompt).input_ids for prompt in _PROMPTS]
    except Exception as error:  # whatever damaged files make tokenizers raise
        told = " ".join(str(error).split()).rstrip(".")[:160]
        raise UserError(f"{folder}: the tokenizer cannot be read ({told}); fetch the teacher again.") from error
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    told_apart = [[token for token in row if token not in special] for row in rows]
    if not all(told_apart) or told_apart[0] == told_apart[1]:
        raise UserError(f"{folder}: the tokenizer knows no words, so that all prompts would be one; fetch the teacher's tokenizer again.")
    highest = max(max(max(row) for row in rows), len(tokenizer) - 1)
    if highest >= vocabulary:
        raise UserError(
            f"{folder}: the tokenizer has a token {highest}, but the text encoder's vocab_size is {vocabulary}; give a folder whose parts "
            "belong together."
        )


def _tokenizer_files(folder: Path) -> Iterator[str]:
    """The files that a tokenizer must have. A whole one has its merges, without which words fall into letters."""
    yield "tokenizer_config.json"
    if not (folder / "tokenizer.json").is_file():
        yield from ("vocab.json", "merges.txt")
        for name in ("vocab.json", "merges.txt"):
            if (folder / name).is_file() and not _has_rules(folder / name):
                raise UserError(f"{folder / name}: holds no rules; fetch the teacher's tokenizer again.")
        return
    model = read_config(folder / "tokenizer.json").get("model")
    if not isinstance(model, dict) or not model.get("vocab") or not model.get("merges"):
        raise UserError(f"{folder / 'tokenizer.json'}: has no vocabulary or no merges; fetch the teacher's tokenizer again.")


def _has_rules(path: Path) -> bool:
    if path.suffix == ".json":
        return bool(read_config(path))
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except ValueError as error:
        raise UserError(f"{path}: is no UTF-8 text; fetch the teacher's tokenizer again.") from error
    return any(line.strip() and not line.startswith("#version") for line in lines)
