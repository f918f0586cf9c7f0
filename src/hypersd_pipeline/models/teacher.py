"""Teachers in the SD1.5 and the SDXL layout: shipped with the package, in a local diffusers folder, or on the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hypersd_pipeline.conditioning import Conditioning, size_conditioning
from hypersd_pipeline.config import Side, Strict
from hypersd_pipeline.diffusion.denoiser import Denoiser
from hypersd_pipeline.diffusion.process import PredictionType, Process
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.files import file_sha256, hub_folder
from hypersd_pipeline.models import text
from hypersd_pipeline.models.backbones import FAMILIES, Backbone, family_of
from hypersd_pipeline.models.config_rules import read_config

log = logging.getLogger(__name__)

Part = Literal["backbone", "vae", "text"]
Dtype = Literal["float32", "float16", "bfloat16"]
SHIPPED = Path(__file__).parents[1] / "assets" / "teacher"
TEXT_BATCH = 64  # prompts a text encoder sees at a time: bounds memory, whatever the caller passes


class TeacherConfig(Strict):
    """Which teacher, and how to hold it.

    Attributes:
        source: ``shipped``, a local folder in diffusers layout, or a hub id (``owner/name``).
        layout: ``sd15``, ``sdxl``, or ``auto``: SDXL where there is a second text encoder.
        prediction_type: what the network puts out. ``auto`` reads the teacher's scheduler config.
        revision, variant: of the hub repository, and of the weight files (``fp16`` ...).
        dtype: of the network and the text encoders. vae_dtype: of the VAE. SDXL's overflows in float16.
        resolution: side of the images in pixels. None for the teacher's own.
    """

    source: str = "shipped"
    layout: Literal["auto", "sd15", "sdxl"] = "auto"
    prediction_type: Literal["auto", "epsilon", "v_prediction", "sample"] = "auto"
    revision: str | None = None
    variant: str | None = None
    dtype: Dtype = "float32"
    vae_dtype: Dtype = "float32"
    resolution: Side | None = None


class Teacher:
    """A frozen teacher. Parts that were not asked for raise ``ValueError`` when they are used.

    Attributes:
        config: as given, with ``auto`` and None replaced by what was found.
        layout: ``sd15`` or ``sdxl``. process: the diffusion process that the network was trained for.
        latent_shape: ``(c, h, w)`` of a sample's latents. resolution: of images, in pixels.
        zero_unconditional: whether SDXL's unconditional embeddings are zeros.
        text_encoders, tokenizers: one each for SD1.5, two for SDXL, none where ``text`` was not asked for.
        folder: where the files are.
    """

    text_encoders: list[Any]
    tokenizers: list[Any]

    def __init__(self, config: TeacherConfig, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device
        self._remote = config.source != "shipped" and not Path(config.source).expanduser().is_dir()
        scheduler = read_config(folder / "scheduler" / "scheduler_config.json")
        self._family = family_of(folder)
        network, vae = (read_config(folder / name / "config.json") for name in (self._family.component, "vae"))
        self.layout = _layout(config, folder)
        self.process = Process.from_config(scheduler, _prediction_type(config, scheduler))
        self._scheduler = scheduler
        self.latent_shape, self.resolution = _latent_shape(config, self._family, network, vae)
        self.scaling_factor = float(vae.get("scaling_factor", 0.18215))
        self.config = config.model_copy(
            update={"layout": self.layout, "prediction_type": self.process.prediction_type, "resolution": self.resolution}
        )
        self.zero_unconditional = bool(read_config(folder / "model_index.json").get("force_zeros_for_empty_prompt", True))
        self._backbone: Backbone | None = None
        self._vae: Any = None
        self.text_encoders, self.tokenizers = [], []
        self._hashes: dict[str, str] = {}

    @property
    def backbone(self) -> Backbone:
        """The denoising network, frozen."""
        return _loaded(self._backbone, "backbone")  # type: ignore[no-any-return]

    @property
    def vae(self) -> Any:
        """diffusers' ``AutoencoderKL``, frozen."""
        return _loaded(self._vae, "vae")

    @property
    def hub_id(self) -> str | None:
        """The teacher's id on the hub. None for one in a folder."""
        return self.config.source if self._remote else None

    def scheduler_config(self) -> dict[str, Any]:
        """The teacher's noise schedule as a diffusers scheduler takes it, to be carried by what is distilled from it."""
        defaults = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "trained_betas": None}
        found = {key: self._scheduler.get(key, default) for key, default in defaults.items()}
        return {**found, "prediction_type": self.process.prediction_type}

    def default_sizes(self, n: int) -> Tensor | None:
        """SDXL's size conditioning of an uncropped square image: float32 ``[n, 6]``. None for SD1.5."""
        if self.layout != "sdxl":
            return None
        square = (self.resolution, self.resolution)
        return size_conditioning(square, (0, 0), square).to(self.device).repeat(n, 1)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of ``b`` prompts, equal to diffusers' ``encode_prompt``. Long prompts are cut, and a warning counts them.

        Returns:
            prompt_embeds ``[b, L, D]``. For SDXL pooled ``[b, P]`` and the default sizes ``[b, 6]``.
        """
        _loaded(self.text_encoders or None, "text")
        if not prompts:
            raise ValueError("encode_prompts needs at least one prompt")
        length = text.max_tokens(self.tokenizers[0], self.text_encoders[0])
        if cut := text.count_truncated(self.tokenizers[0], prompts, length):
            log.warning("%d of %d prompts are longer than %d tokens and were cut", cut, len(prompts), length)
        return Conditioning.cat(*(self._encode(prompts[i : i + TEXT_BATCH]) for i in range(0, len(prompts), TEXT_BATCH)))

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        if self.layout == "sd15":
            return Conditioning(text.encode_sd15(self.tokenizers[0], self.text_encoders[0], prompts))
        return Conditioning(*text.encode_sdxl(self.tokenizers, self.text_encoders, prompts), self.default_sizes(len(prompts)))

    def unconditional(self, n: int = 1) -> Conditioning:
        """The unconditional half of guidance, ``n`` times: the encoded "" for SD1.5, zeros for SDXL (if ``force_zeros_for_empty_prompt``).

        SDXL's ``sizes`` are the default ones. Where images bring their own, both halves must carry the image's.
        """
        one = self.encode_prompts([""])
        if self.layout == "sdxl" and self.zero_unconditional:
            assert one.pooled is not None
            one = Conditioning(torch.zeros_like(one.prompt_embeds), torch.zeros_like(one.pooled), one.sizes)
        return one[torch.zeros(n, dtype=torch.int64, device=self.device)]

    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior of the latents, times the VAE's scaling factor.

        Args:
            images: ``[b, 3, h, w]`` in [-1, 1].

        Returns:
            ``(mean, std)``, each ``[b, c, h/f, w/f]`` in the VAE's dtype; a latent is ``mean + std * randn``.
        """
        posterior = self.vae.encode(images.to(self.device, self.vae.dtype)).latent_dist
        return posterior.mean * self.scaling_factor, posterior.std * self.scaling_factor

    def decode(self, latents: Tensor, *, clip: bool = True) -> Tensor:
        """Images ``[b, 3, h, w]`` in [0, 1], float32, of scaled latents ``[b, c, h/f, w/f]``. Differentiable in the latents.

        Without ``clip`` a little outside the range too, so that saturated pixels keep their gradient.
        """
        images = self.vae.decode(latents.to(self.device, self.vae.dtype) / self.scaling_factor, return_dict=False)[0]
        images = images.float() / 2 + 0.5
        return images.clamp(0, 1) if clip else images  # never in place: the decode path carries gradients in feedback learning

    def denoiser(self) -> Denoiser:
        """The network with its process, without guidance."""
        return Denoiser(self.backbone, self.process)

    def content_hash(self, part: Part) -> str:
        """sha256 over the part's config and weight files (and tokenizer files for ``text``), so that a cache knows its encoder."""
        if part not in self._hashes:
            if self._remote:  # the part may not have been asked for yet; a snapshot folder is named by its commit
                _download(self.config.model_copy(update={"revision": self.folder.name}), (part,))
            digest = hashlib.sha256()
            for file in _part_files(self.folder, part, self.config):
                digest.update(f"{file.relative_to(self.folder).as_posix()}\0{_identity(file)}\n".encode())
            if part == "text":  # it changes the unconditional embedding
                digest.update(f"{self.layout}, force_zeros_for_empty_prompt {self.zero_unconditional}".encode())
            self._hashes[part] = digest.hexdigest()
        return self._hashes[part]


def load_teacher(
    config: TeacherConfig, parts: Iterable[Part] = ("backbone", "vae", "text"), device: torch.device | str | None = None
) -> Teacher:
    """Load the asked parts of a teacher, frozen and in ``eval()``.

    Args:
        parts: of ``backbone``, ``vae``, ``text``. Nothing else is read, and nothing else downloaded.
        device: the accelerator if there is one, unless given.

    Raises:
        UserError: the teacher is missing, damaged, not in safetensors, or of a kind that is not supported.
    """
    parts = tuple(parts)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder = find_folder(config, parts)
    teacher = Teacher(config, folder, where)
    for part in parts:
        for name in part_folders(folder, part):
            if not name.startswith("tokenizer"):
                weight_files(folder / name, config.variant)  # refuses what is not safetensors, before anything is read
    if "backbone" in parts:
        family = teacher._family
        teacher._backbone = family(_load_diffusers(family.class_name, folder, family.component, config.variant, config.dtype).to(where))
    if "vae" in parts:
        teacher._vae = _load_diffusers("AutoencoderKL", folder, "vae", config.variant, config.vae_dtype).to(where)
    if "text" in parts:
        teacher.tokenizers, teacher.text_encoders = _load_text(teacher, folder)
    return teacher


def find_folder(config: TeacherConfig, parts: Iterable[Part] = ("backbone", "vae", "text")) -> Path:
    """The local folder of a teacher; a hub id is downloaded into the hub's cache first (only the asked parts' safetensors).

    Raises:
        UserError: there is no such teacher, or the shipped files are damaged.
    """
    if config.source == "shipped":
        check_shipped(SHIPPED)
        return SHIPPED
    path = Path(config.source).expanduser()
    if path.is_file():
        raise UserError(
            f"teacher.source: {config.source} is a single file; convert it to a diffusers folder with "
            "StableDiffusionPipeline.from_single_file(...).save_pretrained(folder) and give that folder."
        )
    if path.is_dir():
        if not (path / "model_index.json").exists():
            raise UserError(f"teacher.source: {path} has no model_index.json; give a folder that a pipeline's save_pretrained wrote.")
        return path
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", config.source):
        raise UserError(f"teacher.source: there is no folder {config.source}; give an existing diffusers folder, a hub id or 'shipped'.")
    return _download(config, parts)


def check_shipped(folder: Path) -> None:
    """Compare the shipped teacher with ``sha256.json`` beside it.

    Raises:
        UserError: a file is missing, unlisted or changed.
    """
    table = folder / "sha256.json"
    if not table.exists():
        raise UserError(f"{table} is missing, so teacher.source 'shipped' cannot be used; reinstall the package.")
    listed = read_config(table)
    unlisted = {p.relative_to(folder).as_posix() for p in folder.rglob("*.safetensors")} - set(listed)
    changed = [name for name, digest in listed.items() if not (folder / name).is_file() or file_sha256(folder / name) != digest]
    if bad := sorted([*unlisted, *changed]):
        raise UserError(f"{folder}: {', '.join(bad)} differ from sha256.json; reinstall the package to restore the shipped teacher.")


def _download(config: TeacherConfig, parts: Iterable[Part]) -> Path:
    dot = f".{config.variant}" if config.variant else ""
    patterns = ["model_index.json", "*/config.json", "scheduler/*.json"]
    for part in parts:
        networks = [family.component for family in FAMILIES]
        for name in {"backbone": networks, "vae": ["vae"], "text": ["text_encoder", "text_encoder_2"]}[part]:
            stem = "model" if part == "text" else "diffusion_pytorch_model"
            patterns += [f"{name}/{stem}{dot}.safetensors", f"{name}/{stem}{dot}-*.safetensors", f"{name}/{stem}*{dot}.index*.json"]
            patterns += [f"{name}/{stem}-*{dot}.safetensors", f"{name}/{stem}.safetensors.index{dot}.json"]
        if part == "text":
            patterns += ["tokenizer/*", "tokenizer_2/*"]
    folder = hub_folder(config.source, patterns, config.revision, "teacher.source", "a local diffusers folder")
    if not (folder / "model_index.json").exists():
        raise UserError(f"teacher.source: {config.source} on the hub has no model_index.json; give a repository in diffusers layout.")
    return folder


def _load_diffusers(class_name: str, folder: Path, name: str, variant: str | None, dtype: Dtype) -> Any:
    import diffusers

    model = getattr(diffusers, class_name).from_pretrained(
        folder, subfolder=name, variant=variant, use_safetensors=True, torch_dtype=getattr(torch, dtype), local_files_only=True
    )
    return model.requires_grad_(False).eval()


def _load_text(teacher: Teacher, folder: Path) -> tuple[list[Any], list[Any]]:
    import transformers

    transformers.logging.disable_progress_bar()  # a bar per opened file would drown the stages' own
    classes = [transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection][: 2 if teacher.layout == "sdxl" else 1]
    tokenizers, encoders = [], []
    for suffix, cls in zip(("", "_2"), classes, strict=False):
        tokenizers.append(transformers.CLIPTokenizer.from_pretrained(folder, subfolder=f"tokenizer{suffix}", local_files_only=True))
        encoder: Any = cls.from_pretrained(
            folder, subfolder=f"text_encoder{suffix}", variant=teacher.config.variant, use_safetensors=True, local_files_only=True
        )
        encoders.append(encoder.to(teacher.device, getattr(torch, teacher.config.dtype)).requires_grad_(False).eval())
    return tokenizers, encoders


def _loaded(part: Any, name: str) -> Any:
    if part is None:
        raise ValueError(f"this teacher was loaded without {name!r}; add it to load_teacher's parts")
    return part


def _found_layout(folder: Path) -> Literal["sd15", "sdxl"]:
    second = read_config(folder / "model_index.json").get("text_encoder_2")
    return "sdxl" if isinstance(second, list) and second and second[0] else "sd15"


def _layout(config: TeacherConfig, folder: Path) -> Literal["sd15", "sdxl"]:
    found = _found_layout(folder)
    if config.layout not in ("auto", found):
        raise UserError(f"teacher.layout: {config.layout!r} was asked for, but {folder} has the {found} layout; use 'auto'.")
    return found


def _prediction_type(config: TeacherConfig, scheduler: dict[str, Any]) -> PredictionType:
    found = scheduler.get("prediction_type", "epsilon") if config.prediction_type == "auto" else config.prediction_type
    if found not in ("epsilon", "v_prediction", "sample"):
        raise UserError(f"scheduler_config.json: prediction_type {found!r} is none of epsilon, v_prediction, sample; use another teacher.")
    return found


def _latent_shape(
    config: TeacherConfig, family: type[Backbone], network: dict[str, Any], vae: dict[str, Any]
) -> tuple[tuple[int, int, int], int]:
    """``(channels, height, width)`` of the latents, and the side of the image in pixels."""
    channels = int(vae.get("latent_channels", 4))
    wanted, side = family.latent_shape(network)
    if wanted != channels:
        raise UserError(
            f"{family.component}/config.json: in_channels is {wanted}, the VAE has {channels}; "
            "use a text-to-image teacher (not an inpainting one)."
        )
    if any(vae.get(key) is not None for key in ("latents_mean", "latents_std")) or vae.get("shift_factor"):
        raise UserError("vae/config.json: latents_mean, latents_std and shift_factor are not supported; use a teacher without them.")
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    if config.resolution is None and side is None:
        raise UserError(
            f"{family.component}/config.json: {family.size_key} is null, which leaves the side of images open; set teacher.resolution."
        )
    resolution = config.resolution or (side or 0) * factor
    if resolution % factor:
        nearest = resolution // factor * factor or factor
        raise UserError(f"teacher.resolution: {resolution} is not a multiple of {factor}, the VAE's reduction; use {nearest}.")
    return (channels, resolution // factor, resolution // factor), resolution


def part_folders(folder: Path, part: Part) -> list[str]:
    if part == "backbone":
        return [family_of(folder).component]
    if part == "vae":
        return [part]
    second = ["text_encoder_2", "tokenizer_2"] if _found_layout(folder) == "sdxl" else []
    return ["text_encoder", "tokenizer", *second]


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The safetensors files that ``from_pretrained`` reads for this variant.

    Raises:
        UserError: there are none.
    """
    base = "model" if folder.name.startswith("text_encoder") else "diffusion_pytorch_model"
    files = sorted(folder.glob(f"{base}*.safetensors"))  # not an adapter's, which may lie beside them
    stems = {f: re.sub(r"-\d{5}-of-\d{5}", "", f.name.removesuffix(".safetensors")) for f in files}
    stems = {f: stem.partition(".")[2] for f, stem in stems.items()}
    found = [f for f in files if stems[f] == (variant or "")]
    if found:
        return found
    if any(folder.glob("*.bin")):
        raise UserError(
            f"{folder} has only .bin weights, which can run code when they are opened; convert it with a pipeline's "
            "save_pretrained(folder, safe_serialization=True)."
        )
    there = ", ".join(f.name for f in files) or "none"
    raise UserError(f"{folder} has no safetensors weights of variant {variant!r}; check teacher.variant (there: {there}).")


def _part_files(folder: Path, part: Part, config: TeacherConfig) -> list[Path]:
    files: list[Path] = []
    for name in part_folders(folder, part):
        if name.startswith("tokenizer"):
            files += sorted(p for p in (folder / name).iterdir() if p.is_file())
        else:
            files += [folder / name / "config.json", *weight_files(folder / name, config.variant)]
    return files


def _identity(path: Path) -> str:
    if path.name != "config.json":
        return file_sha256(path)
    # saving a model again notes the library's version and the old path in its config: that is no other model
    config = {k: v for k, v in read_config(path).items() if not k.startswith("_") and k != "transformers_version"}
    return json.dumps(config, sort_keys=True)
