"""One fault at a time in a teacher, a LoRA or a judge: each is refused in one sentence that names the file, before anything is computed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.io.lora import WEIGHTS, LoRADataset
from hypersd_pipeline.metrics.config import ClipConfig, FeatureConfig
from hypersd_pipeline.models import dual_encoder, quality_head
from hypersd_pipeline.models.contract import Contract
from hypersd_pipeline.models.lora import LoRA
from hypersd_pipeline.models.one_step import check_network
from hypersd_pipeline.models.teacher import TeacherConfig
from hypersd_pipeline.models.teacher_check import CheckedTeacher, check_teacher
from hypersd_pipeline.models.tensors import is_finite
from hypersd_pipeline.perception.config import SoloConfig
from hypersd_pipeline.rewards.image_reward import ImageRewardConfig
from hypersd_pipeline.rewards.laion_aesthetic import LaionAestheticConfig
from hypersd_pipeline.rewards.pick_score import PickScoreConfig
from hypersd_pipeline.rewards.predictor import PredictorHead
from hypersd_pipeline.rewards.text_image import TextImageConfig
from hypersd_pipeline.rewards.weights import Weights, check_weights
from hypersd_pipeline.training.config import PACKAGED, FeedbackConfig
from hypersd_pipeline.verdicts import cache_folder

ROOT = Path(__file__).parents[2]
Fault = Callable[[Path], Any]
UNET, VAE, TEXT = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    """Verdicts of this module alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("teachers")
    return {layout: tiny.write_teacher(root / layout, layout) for layout in ("sd15", "sdxl")}


@pytest.fixture(scope="module")
def checked(folders: dict[str, Path]) -> CheckedTeacher:
    return check_teacher(TeacherConfig(source=str(folders["sd15"])))


def assert_refused(action: Callable[[], Any], *words: str) -> None:
    """One sentence, with the words."""
    with pytest.raises(UserError) as caught:
        action()
    sentence = str(caught.value)
    assert "\n" not in sentence and "Traceback" not in sentence and sentence.endswith((".", "?")) and len(sentence) < 700, sentence
    assert all(word in sentence for word in words), sentence


# --- faults ------------------------------------------------------------------------------------------------------------------------------


def config(file: str, **changes: Any) -> Fault:
    """Other values in a JSON file; ... removes a key."""

    def damage(folder: Path) -> None:
        values = json.loads((folder / file).read_text())
        values.update(changes)
        (folder / file).write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))

    return damage


def text(file: str, content: str | bytes) -> Fault:
    def damage(folder: Path) -> None:
        (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def gone(*names: str) -> Fault:
    def damage(folder: Path) -> None:
        for name in names:
            shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()

    return damage


def tensors(file: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Fault:
    def damage(folder: Path) -> None:
        values = load_file(folder / file)
        changed = change(values)
        save_file(values if changed is None else changed, folder / file, {"format": "pt"})

    return damage


def drop(file: str, part: str) -> Fault:
    return tensors(file, lambda values: {name: value for name, value in values.items() if part not in name})


def poison(file: str, number: float) -> Fault:
    def change(values: dict[str, torch.Tensor]) -> None:
        values[max(values)].view(-1)[-1] = number

    return tensors(file, change)


def misshape(file: str) -> Fault:
    def change(values: dict[str, torch.Tensor]) -> None:
        values[max(values)] = torch.zeros(3, 5)

    return tensors(file, change)


def cut(file: str, size: int) -> Fault:
    def damage(folder: Path) -> None:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[:size] if size >= 0 else content[: len(content) + size])

    return damage


def renamed(file: str, new: str) -> Fault:
    return lambda folder: (folder / file).rename(folder / new)


def unfused(folder: Path) -> None:
    """A pipeline that was saved with its LoRA still attached."""
    from peft import LoraConfig

    pipe = tiny.load_pipeline(folder)
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]), adapter_name="style")
    pipe.fuse_lora()
    pipe.save_pretrained(folder)


def sharded(*, index: bool = True, first: bool = True, table: bool = True) -> Fault:
    """The UNet in several files, of which something lacks."""

    def damage(folder: Path) -> None:
        tiny.load_pipeline(folder).unet.save_pretrained(folder / "unet", max_shard_size="100KB")
        (folder / UNET).unlink(missing_ok=True)
        listing = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
        if not table:
            listing.write_text('{"weight_map": {}}')
        if not index:
            listing.unlink()
        if not first:
            next(iter(sorted((folder / "unet").glob("*-00001-of-*")))).unlink()

    return damage


def adapter_beside(folder: Path) -> None:
    """Harmless: a LoRA that lies beside the weights is not read as a part of them."""
    save_file({"x": torch.zeros(1)}, folder / "unet" / "pytorch_lora_weights.safetensors")


SCHEDULER = "scheduler/scheduler_config.json"
TEACHERS: list[tuple[str, str, Fault, list[str]]] = [
    # parts
    ("no index", "sd15", gone("model_index.json"), ["model_index.json"]),
    ("no unet", "sd15", gone("unet"), ["unet"]),
    ("no vae", "sd15", gone("vae"), ["vae", "is missing"]),
    ("no text encoder", "sd15", gone("text_encoder"), ["text_encoder", "is missing"]),
    ("no second text encoder", "sdxl", gone("text_encoder_2"), ["text_encoder_2", "is missing"]),
    ("no tokenizer", "sd15", gone("tokenizer"), ["tokenizer", "is missing"]),
    ("no second tokenizer", "sdxl", gone("tokenizer_2"), ["tokenizer_2", "is missing"]),
    ("no scheduler", "sd15", gone("scheduler"), ["scheduler_config.json", "is missing"]),
    ("no unet config", "sd15", gone("unet/config.json"), ["unet/config.json", "is missing"]),
    ("no unet weights", "sd15", gone(UNET), ["unet", "no safetensors weights"]),
    ("no vae weights", "sd15", gone(VAE), ["vae", "no safetensors weights"]),
    ("no text weights", "sd15", gone(TEXT), ["text_encoder", "no safetensors weights"]),
    ("pickled weights", "sd15", renamed(UNET, "unet/diffusion_pytorch_model.bin"), ["unet", "only .bin weights"]),
    ("weights are a folder", "sd15", lambda f: (gone(UNET)(f), (f / UNET).mkdir()), ["diffusion_pytorch_model.safetensors"]),
    # JSON
    ("index cut off", "sd15", text("model_index.json", '{"unet": ['), ["model_index.json", "not valid JSON"]),
    ("index a list", "sd15", text("model_index.json", "[]"), ["model_index.json", "no keys and values"]),
    ("config empty", "sd15", text("unet/config.json", ""), ["unet/config.json", "not valid JSON"]),
    ("config null", "sd15", text("vae/config.json", "null"), ["vae/config.json", "no keys and values"]),
    ("config nested", "sd15", text(SCHEDULER, "[" * 100_000), ["scheduler_config.json", "not valid JSON"]),
    ("config no text", "sd15", text("text_encoder/config.json", b"\xff\xfe{"), ["text_encoder/config.json", "not valid JSON"]),
    # index
    ("class of the network", "sd15", config("model_index.json", unet=["diffusers", "UNet3DConditionModel"]), ["unet is a UNet3DC"]),
    ("class of the text encoder", "sd15", config("model_index.json", text_encoder=["transformers", "T5EncoderModel"]), ["T5EncoderModel"]),
    ("class is a number", "sd15", config("model_index.json", vae=[1, 2]), ["model_index.json", "vae"]),
    ("entry is null", "sd15", config("model_index.json", tokenizer=[None, None]), ["model_index.json", "has no tokenizer"]),
    ("only one second part", "sdxl", config("model_index.json", tokenizer_2=...), ["model_index.json", "has no tokenizer_2"]),
    # scheduler
    ("T of 0", "sd15", config(SCHEDULER, num_train_timesteps=0), ["num_train_timesteps is 0"]),
    ("T of 1", "sd15", config(SCHEDULER, num_train_timesteps=1), ["num_train_timesteps is 1"]),
    ("T of a billion", "sd15", config(SCHEDULER, num_train_timesteps=10**9), ["num_train_timesteps is 1000000000"]),
    ("T with a fraction", "sd15", config(SCHEDULER, num_train_timesteps=999.5), ["num_train_timesteps is 999.5"]),
    ("T as text", "sd15", config(SCHEDULER, num_train_timesteps="1000"), ["num_train_timesteps is '1000'"]),
    ("beta of 5", "sd15", config(SCHEDULER, beta_end=5), ["beta_end is 5"]),
    ("beta of 1", "sd15", config(SCHEDULER, beta_end=1.0), ["beta_end is 1.0"]),
    ("beta negative", "sd15", config(SCHEDULER, beta_start=-0.1), ["beta_start is -0.1"]),
    ("beta as text", "sd15", config(SCHEDULER, beta_start="small"), ["beta_start is 'small'"]),
    ("beta NaN", "sd15", config(SCHEDULER, beta_start=float("nan")), ["beta_start is nan"]),
    ("beta null", "sd15", config(SCHEDULER, beta_end=None), ["beta_end is None"]),
    ("betas too large", "sd15", config(SCHEDULER, beta_end=0.9), ["leave nothing of the image"]),
    ("betas of another number", "sd15", config(SCHEDULER, trained_betas=[0.1] * 7), ["trained_betas", "1000 numbers"]),
    ("betas not numbers", "sd15", config(SCHEDULER, trained_betas=["a"] * 1000), ["trained_betas"]),
    ("schedule unknown", "sd15", config(SCHEDULER, beta_schedule="cosine"), ["beta_schedule is 'cosine'"]),
    ("zero SNR", "sd15", config(SCHEDULER, rescale_betas_zero_snr=True), ["rescale_betas_zero_snr"]),
    ("prediction unknown", "sd15", config(SCHEDULER, prediction_type="flow"), ["prediction_type is 'flow'"]),
    ("prediction a number", "sd15", config(SCHEDULER, prediction_type=3), ["prediction_type is '3'"]),
    ("flow matching", "sd15", config(SCHEDULER, _class_name="FlowMatchEulerDiscreteScheduler"), ["_class_name", "FlowMatch"]),
    # network's configuration
    ("class of another network", "sd15", config("unet/config.json", _class_name="Transformer2DModel"), ["unet/config.json", "_class_name"]),
    ("sample_size null", "sd15", config("unet/config.json", sample_size=None), ["sample_size is null", "teacher.resolution"]),
    ("sample_size a pair", "sd15", config("unet/config.json", sample_size=[8, 16]), ["sample_size is [8, 16]", "square"]),
    ("sample_size text", "sd15", config("unet/config.json", sample_size="8"), ["sample_size is '8'"]),
    ("sample_size 0", "sd15", config("unet/config.json", sample_size=0), ["sample_size is '0'"]),
    ("channels text", "sd15", config("unet/config.json", in_channels="four"), ["unet/config.json", "in_channels"]),
    ("inpainting", "sd15", config("unet/config.json", in_channels=9), ["in_channels is 9", "inpainting"]),
    ("out_channels other", "sd15", config("unet/config.json", out_channels=8), ["out_channels is 8"]),
    ("widths missing", "sd15", config("unet/config.json", block_out_channels=...), ["block_out_channels is missing"]),
    ("widths a number", "sd15", config("unet/config.json", block_out_channels=16), ["block_out_channels is '16'"]),
    ("widths other", "sd15", config("unet/config.json", block_out_channels=[16, 64]), [UNET, "instead of"]),
    (
        "widths no multiple",
        "sd15",
        config("unet/config.json", block_out_channels=[17, 33]),
        ["unet/config.json", "no network can be built"],
    ),
    ("blocks of other numbers", "sd15", config("unet/config.json", down_block_types=["DownBlock2D"]), ["no network can be built"]),
    ("block unknown", "sd15", config("unet/config.json", up_block_types=["UpBlock2D", "MyBlock"]), ["no network can be built", "MyBlock"]),
    ("a million layers", "sd15", config("unet/config.json", layers_per_block=10**6), ["layers_per_block is '1000000'"]),
    ("layers more", "sd15", config("unet/config.json", layers_per_block=2), [UNET, "lacks"]),
    ("text width other", "sd15", config("unet/config.json", cross_attention_dim=48), ["cross_attention_dim is 48", "32"]),
    ("text width missing", "sd15", config("unet/config.json", cross_attention_dim=...), ["cross_attention_dim is missing"]),
    ("pooled width other", "sdxl", config("unet/config.json", projection_class_embeddings_input_dim=100), ["embeddings_input_dim is 100"]),
    ("no size conditioning", "sdxl", config("unet/config.json", addition_embed_type=None), ["addition_embed_type"]),
    # VAE's configuration
    ("scaling text", "sd15", config("vae/config.json", scaling_factor="big"), ["vae/config.json", "scaling_factor is 'big'"]),
    ("scaling 0", "sd15", config("vae/config.json", scaling_factor=0), ["scaling_factor is '0'"]),
    ("scaling negative", "sd15", config("vae/config.json", scaling_factor=-1.0), ["scaling_factor is '-1.0'"]),
    ("scaling NaN", "sd15", config("vae/config.json", scaling_factor=float("nan")), ["scaling_factor is 'nan'"]),
    ("scaling null", "sd15", config("vae/config.json", scaling_factor=None), ["scaling_factor is 'None'"]),
    ("latent channels", "sd15", config("vae/config.json", latent_channels=16), ["in_channels is 4, the VAE has 16"]),
    ("shift", "sd15", config("vae/config.json", shift_factor=0.1), ["shift_factor"]),
    (
        "VAE's widths missing",
        "sd15",
        config("vae/config.json", block_out_channels=...),
        ["vae/config.json", "block_out_channels is missing"],
    ),
    ("VAE's class", "sd15", config("vae/config.json", _class_name="AutoencoderTiny"), ["vae/config.json", "AutoencoderTiny"]),
    # text encoder's configuration
    (
        "hidden size missing",
        "sd15",
        config("text_encoder/config.json", hidden_size=...),
        ["text_encoder/config.json", "hidden_size is missing"],
    ),
    ("heads 0", "sd15", config("text_encoder/config.json", num_attention_heads=0), ["num_attention_heads is"]),
    ("heads no divisor", "sd15", config("text_encoder/config.json", num_attention_heads=5), ["hidden_size is 32", "5"]),
    ("another text model", "sd15", config("text_encoder/config.json", model_type="t5"), ["model_type is 't5'"]),
    ("activation unknown", "sd15", config("text_encoder/config.json", hidden_act="wave"), ["text_encoder/config.json", "wave"]),
    ("vocabulary too small", "sd15", config("text_encoder/config.json", vocab_size=9), ["text_encoder", "token_embedding"]),
    ("layers more in text", "sd15", config("text_encoder/config.json", num_hidden_layers=5), ["text_encoder/model.safetensors", "lacks"]),
    # tensors
    ("UNet cut off", "sd15", cut(UNET, -100), [UNET, "no whole safetensors file"]),
    ("UNet cut in the header", "sd15", cut(UNET, 20), [UNET, "no whole safetensors file"]),
    ("UNet empty", "sd15", cut(UNET, 0), [UNET, "no whole safetensors file"]),
    ("VAE cut off", "sd15", cut(VAE, 5000), [VAE, "no whole safetensors file"]),
    ("text cut off", "sd15", cut(TEXT, -1), [TEXT, "no whole safetensors file"]),
    ("UNet lacks a tensor", "sd15", drop(UNET, "conv_out.bias"), [UNET, "lacks conv_out.bias"]),
    ("VAE lacks a tensor", "sd15", drop(VAE, "decoder.conv_in.weight"), [VAE, "lacks decoder.conv_in.weight"]),
    ("text lacks a tensor", "sd15", drop(TEXT, "layers.1.mlp.fc1.weight"), [TEXT, "lacks", "layers.1.mlp.fc1.weight"]),
    (
        "second text lacks a tensor",
        "sdxl",
        drop("text_encoder_2/model.safetensors", "text_projection"),
        ["text_encoder_2", "text_projection"],
    ),
    ("UNet without tensors", "sd15", tensors(UNET, lambda values: {}), [UNET, "holds no tensors"]),
    ("UNet has one more", "sd15", tensors(UNET, lambda v: v.update(more=torch.zeros(1))), [UNET, "holds more"]),
    ("UNet misshaped", "sd15", misshape(UNET), [UNET, "[3, 5] instead of"]),
    ("VAE misshaped", "sd15", misshape(VAE), [VAE, "[3, 5] instead of"]),
    ("text misshaped", "sd15", misshape(TEXT), [TEXT, "[3, 5] instead of"]),
    (
        "UNet of integers",
        "sd15",
        tensors(UNET, lambda v: v.update({"conv_in.bias": torch.zeros(16, dtype=torch.int8)})),
        [UNET, "conv_in.bias", "I8"],
    ),
    ("NaN in the UNet", "sd15", poison(UNET, float("nan")), [UNET, "NaN or infinite"]),
    ("infinity in the UNet", "sd15", poison(UNET, float("inf")), [UNET, "NaN or infinite"]),
    ("NaN in the VAE", "sd15", poison(VAE, float("nan")), [VAE, "NaN or infinite"]),
    ("NaN in the text encoder", "sd15", poison(TEXT, float("nan")), [TEXT, "NaN or infinite"]),
    ("NaN in the second one", "sdxl", poison("text_encoder_2/model.safetensors", float("nan")), ["text_encoder_2", "NaN or infinite"]),
    ("LoRA still attached", "sd15", unfused, [UNET, "unload_lora_weights()"]),
    ("LoRA in the text encoder", "sd15", tensors(TEXT, lambda v: v.update({"a.lora_A.default.weight": torch.zeros(1)})), [TEXT, "adapter"]),
    ("a shard is missing", "sd15", sharded(first=False), ["unet", "shard 1 of"]),
    ("no index of shards", "sd15", sharded(index=False), ["unet", "no index"]),
    ("another index of shards", "sd15", sharded(table=False), ["index.json", "not the index"]),
    (
        "whole and in shards",
        "sd15",
        lambda f: (shutil.copy(f / UNET, f / "kept"), sharded()(f), (f / "kept").rename(f / UNET)),
        ["holds too"],
    ),
    # tokenizers
    ("no vocabulary", "sd15", gone("tokenizer/tokenizer.json"), ["tokenizer", "vocab.json is missing"]),
    (
        "vocabulary empty",
        "sd15",
        config("tokenizer/tokenizer.json", model={"type": "BPE", "vocab": {}, "merges": []}),
        ["tokenizer.json", "no vocab"],
    ),
    ("merges empty", "sd15", lambda f: _model(f, merges=[]), ["tokenizer.json", "no merges"]),
    ("no words", "sd15", lambda f: _model(f, only_special=True), ["tokenizer"]),
    ("no tokenizer config", "sd15", gone("tokenizer/tokenizer_config.json"), ["tokenizer_config.json is missing"]),
    ("tokenizer damaged", "sd15", text("tokenizer/tokenizer.json", "{"), ["tokenizer.json", "not valid JSON"]),
    ("tokenizer of a larger model", "sd15", lambda f: _more_tokens(f), ["tokenizer", "vocab_size"]),
]


def _model(folder: Path, *, merges: list[Any] | None = None, only_special: bool = False) -> None:
    path = folder / "tokenizer" / "tokenizer.json"
    values = json.loads(path.read_text())
    if merges is not None:
        values["model"]["merges"] = merges
    if only_special:
        values["model"]["vocab"] = {name: number for name, number in values["model"]["vocab"].items() if name.startswith("<|")}
    path.write_text(json.dumps(values))


def _more_tokens(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["vocab"] |= {f"word{i}</w>": len(values["model"]["vocab"]) + 100 + i for i in range(5)}
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(("layout", "fault", "words"), [row[1:] for row in TEACHERS], ids=[row[0] for row in TEACHERS])
def test_a_teacher_with_one_fault_is_refused(folders, tmp_path, layout, fault, words):
    folder = shutil.copytree(folders[layout], tmp_path / layout)
    fault(folder)
    assert_refused(lambda: check_teacher(TeacherConfig(source=str(folder))), *words)


@pytest.mark.parametrize(
    ("layout", "fault", "given"),
    [
        ("sd15", lambda f: None, {}),
        ("sdxl", lambda f: None, {}),
        ("sd15", sharded(), {}),
        ("sd15", adapter_beside, {}),
        ("sd15", config("unet/config.json", sample_size=[8, 8]), {}),
        ("sd15", config("unet/config.json", sample_size=None), {"resolution": 64}),
        ("sd15", tensors(UNET, lambda v: {name: value.half() for name, value in v.items()}), {}),
        ("sd15", lambda f: tiny.load_pipeline(f).to(torch.float16).save_pretrained(f, variant="fp16"), {"variant": "fp16"}),
        ("sd15", tensors(TEXT, lambda v: {f"text_model.{name}": value for name, value in v.items()}), {}),
        ("sd15", tensors(TEXT, lambda v: v.update({"text_model.embeddings.position_ids": torch.arange(77)[None]})), {}),
    ],
)  # fmt: skip
def test_a_good_teacher_passes(folders, tmp_path, layout, fault, given):
    folder = shutil.copytree(folders[layout], tmp_path / layout)
    fault(folder)
    good = check_teacher(TeacherConfig(source=str(folder), **given))
    assert "conv_in" in good.modules and good.shapes["conv_in.weight"][0] == 16 and good.teacher.latent_shape == (4, 8, 8)


def test_old_names_of_the_autoencoder_s_attention_are_known(folders, tmp_path):
    """Stable Diffusion 1.5 on the hub still has them."""
    folder = shutil.copytree(folders["sd15"], tmp_path / "old")
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def change(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        names = {name: name for name in values}
        for new, before in old.items():
            names = {name: kept.replace(new, before) for name, kept in names.items()}
        return {names[name]: value for name, value in values.items()}

    tensors(VAE, change)(folder)
    assert any("proj_attn" in name for name in load_file(folder / VAE))
    check_teacher(TeacherConfig(source=str(folder)))


def test_the_shipped_teacher_is_good_and_a_second_check_reads_nothing(monkeypatch):
    check_teacher(TeacherConfig())
    monkeypatch.setattr("hypersd_pipeline.models.teacher_check._check_contents", lambda *_: pytest.fail("read again"))
    assert check_teacher(TeacherConfig()).teacher.process.num_train_timesteps == 1000
    assert list(cache_folder().glob("*.json"))


def test_a_refusal_is_not_remembered_and_a_change_is_seen(folders, tmp_path):
    folder = shutil.copytree(folders["sd15"], tmp_path / "changed")
    check_teacher(TeacherConfig(source=str(folder)))
    whole = (folder / UNET).read_bytes()
    poison(UNET, float("nan"))(folder)
    for _ in range(2):
        assert_refused(lambda: check_teacher(TeacherConfig(source=str(folder))), "NaN")
    (folder / UNET).write_bytes(whole)
    check_teacher(TeacherConfig(source=str(folder)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_what_is_not_finite_is_seen_in_every_type(dtype, value):
    numbers = torch.zeros(7, dtype=dtype)
    assert is_finite(numbers) and is_finite(numbers[:0]) and is_finite(torch.arange(3))
    numbers[3] = value
    assert not is_finite(numbers)


@pytest.mark.parametrize(
    ("targets", "wrong"), [(("to_q", "to_z"), "to_z"), (("conv",), None), (("attn9.to_q",), "attn9.to_q"), (("o_q",), "o_q")]
)
def test_each_target_module_must_match(checked, targets, wrong):
    if wrong is None:
        checked.check_targets("tscd_k8.stage", targets)
    else:
        assert_refused(lambda: checked.check_targets("tscd_k8.stage", targets), "tscd_k8.stage.lora.target_modules", wrong)


# --- LoRAs and contracts -----------------------------------------------------------------------------------------------------------------

CONTRACT = {"scheduler": "DDIMScheduler", "scheduler_config": {}, "steps": 4, "guidance_scale": 1.0}
MODULE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def lora_tensors(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    pair = {f"unet.{MODULE}.lora_A.weight": torch.ones(2, 16), f"unet.{MODULE}.lora_B.weight": torch.ones(16, 2)}
    return {**pair, **{f"unet.{name}": value for name, value in changes.items()}}


A, B, OTHER = f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight", MODULE.replace("to_q", "to_v")
LORAS: list[tuple[str, dict[str, torch.Tensor], dict[str, Any], dict[str, str], list[str]]] = [
    ("no tensors", {}, {}, {}, ["holds no tensors"]),
    ("NaN", lora_tensors(**{A: torch.full((2, 16), torch.nan)}), {}, {}, ["to_q", "NaN or infinite"]),
    ("infinity", lora_tensors(**{B: torch.full((16, 2), torch.inf)}), {}, {}, ["to_q", "NaN or infinite"]),
    ("no pair", lora_tensors(**{B: torch.ones(16, 3)}), {}, {}, ["to_q", "no pair"]),
    ("half a pair", {k: v for k, v in lora_tensors().items() if "lora_A" in k}, {}, {}, ["only one of lora_A and lora_B"]),
    ("another network's width", lora_tensors(**{A: torch.ones(2, 48)}), {}, {}, ["to_q", "does not fit the teacher's network"]),
    (
        "a module that there is not",
        lora_tensors(**{"x.lora_A.weight": torch.ones(2, 4), "x.lora_B.weight": torch.ones(4, 2)}),
        {},
        {},
        ["'x'"],
    ),
    (
        "two ranks",
        lora_tensors(**{f"{OTHER}.lora_A.weight": torch.ones(3, 16), f"{OTHER}.lora_B.weight": torch.ones(16, 3)}),
        {},
        {},
        ["rank 3"],
    ),
    ("an alpha", lora_tensors(**{f"{MODULE}.alpha": torch.ones(())}), {}, {}, ["alpha", "not supported"]),
    ("alpha in the metadata", lora_tensors(), {}, {"lora_adapter_metadata": '{"unet.r": 2, "unet.lora_alpha": 8}'}, ["alpha is 8"]),
    ("metadata damaged", lora_tensors(), {}, {"lora_adapter_metadata": "{"}, ["lora_adapter_metadata"]),
    ("key of another layout", {"lora_unet_x.lora_up.weight": torch.ones(2, 2)}, {}, {}, ["is not in diffusers' PEFT format"]),
    ("steps 0", lora_tensors(), {"steps": 0}, {}, ["0 steps"]),
    ("steps negative", lora_tensors(), {"steps": -4}, {}, ["-4 steps"]),
    ("steps of a million", lora_tensors(), {"steps": 10**6}, {}, ["1000000 steps"]),
    ("steps with a fraction", lora_tensors(), {"steps": 2.5}, {}, ["no readable sampling_contract"]),
    ("steps true", lora_tensors(), {"steps": True}, {}, ["no readable sampling_contract"]),
    ("steps infinite", lora_tensors(), {"steps": float("inf")}, {}, ["no readable sampling_contract"]),
    ("more steps than TCD's points", lora_tensors(), {"steps": 60, "timestep_spacing": "tcd"}, {}, ["60 steps"]),
    ("eta of 7", lora_tensors(), {"eta": 7}, {}, ["eta of 7"]),
    ("eta NaN", lora_tensors(), {"eta": float("nan")}, {}, ["eta of nan"]),
    ("timestep beyond the end", lora_tensors(), {"one_step_timesteps": [5000]}, {}, ["timestep 5000", "999"]),
    ("timestep negative", lora_tensors(), {"timesteps": [-1]}, {}, ["timestep -1"]),
    ("timesteps empty", lora_tensors(), {"timesteps": []}, {}, ["no readable sampling_contract"]),
    ("guidance", lora_tensors(), {"guidance_scale": 7.5}, {}, ["guidance_scale 7.5"]),
    ("no contract", lora_tensors(), {}, {"sampling_contract": ""}, ["no readable sampling_contract"]),
    ("contract a list", lora_tensors(), {}, {"sampling_contract": "[1]"}, ["no readable sampling_contract"]),
    ("contract nested", lora_tensors(), {}, {"sampling_contract": "[" * 100_000}, ["no readable sampling_contract"]),
]


@pytest.mark.parametrize(("values", "contract", "metadata", "words"), [row[1:] for row in LORAS], ids=[row[0] for row in LORAS])
def test_a_lora_with_one_fault_is_refused(checked, tmp_path, values, contract, metadata, words):
    save_file(values, tmp_path / WEIGHTS, {"sampling_contract": json.dumps({**CONTRACT, **contract}), **metadata})
    assert_refused(lambda: LoRADataset(filepath=str(tmp_path)).check(checked.shapes, 1000), WEIGHTS, *words)


def test_a_good_lora_passes(checked, tmp_path):
    save_file(lora_tensors(), tmp_path / WEIGHTS, {"sampling_contract": json.dumps(CONTRACT)})
    LoRADataset(filepath=str(tmp_path)).check(checked.shapes, 1000)
    assert Contract.of(LoRA({}, {"sampling_contract": json.dumps(CONTRACT)})).steps == 4


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\x08\x00\x00\x00\x00\x00\x00\x00[1, 2]  "])
def test_a_lora_that_is_no_safetensors_file_is_named(checked, tmp_path, content):
    (tmp_path / WEIGHTS).write_bytes(content)
    assert_refused(lambda: LoRADataset(filepath=str(tmp_path)).check(checked.shapes, 1000), WEIGHTS, "damaged")


UNETS: list[tuple[str, Callable[[Path], Any], list[str]]] = [
    ("no contract", gone("sampling_contract.json"), ["sampling_contract.json", "cannot be read"]),
    ("contract a list", text("sampling_contract.json", "[]"), ["sampling_contract.json", "no contract"]),
    ("no timesteps", text("sampling_contract.json", '{"data_rows": "x"}'), ["sampling_contract.json", "no contract"]),
    ("timestep beyond the end", text("sampling_contract.json", '{"data_rows": "x", "timesteps": [1000]}'), ["timestep 1000", "999"]),
    ("no weights", gone("diffusion_pytorch_model.safetensors"), ["no safetensors weights"]),
    ("weights cut off", cut("diffusion_pytorch_model.safetensors", -9), ["no whole safetensors file"]),
    ("a tensor less", drop("diffusion_pytorch_model.safetensors", "conv_out.bias"), ["lacks conv_out.bias"]),
    ("NaN", poison("diffusion_pytorch_model.safetensors", float("nan")), ["NaN or infinite"]),
]


@pytest.mark.parametrize(("fault", "words"), [row[1:] for row in UNETS], ids=[row[0] for row in UNETS])
def test_a_one_step_unet_with_one_fault_is_refused(folders, checked, tmp_path, fault, words):
    folder = shutil.copytree(folders["sd15"] / "unet", tmp_path / "unet")
    text("sampling_contract.json", '{"data_rows": "x", "timesteps": [800]}')(folder)
    check_network(folder, checked.shapes, 1000)
    fault(folder)
    assert_refused(lambda: check_network(folder, checked.shapes, 1000), str(folder), *words)


# --- judges ------------------------------------------------------------------------------------------------------------------------------


def packaged(name: str) -> Path:
    return ROOT / PACKAGED / f"{name}.safetensors"


def rewritten(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor], dict[str, str]], Any], *, rehash: bool = True) -> Path:
    """A judge of our own with other tensors or metadata, and its recorded hash in order."""
    values, metadata = dual_encoder.read_checked(source)
    change(values, metadata)
    if rehash and "sha256" in metadata:
        metadata["sha256"] = dual_encoder.tensors_sha256(values)
    save_file(values, target, metadata)
    return target


def nan_in(values: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    values[min(values)].view(-1)[0] = float("nan")


def without(key: str) -> Callable[[dict[str, torch.Tensor], dict[str, str]], Any]:
    return lambda values, metadata: metadata.pop(key)


def flipped(values: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    values[min(values)].view(-1)[0] += 1


OWN: list[tuple[str, str, Callable[..., Any], bool, list[str]]] = [
    ("NaN", "text_image_reward", nan_in, True, ["NaN or infinite"]),
    ("another value", "text_image_reward", flipped, False, ["do not match their recorded sha256"]),
    ("no hash", "text_image_reward", without("sha256"), False, ["not written by this project"]),
    ("no config", "text_image_reward", without("config"), True, ["'config'"]),
    ("no encoder", "text_image_reward", without("dual_encoder"), True, ["another dual encoder"]),
    ("no role", "text_image_reward", without("role"), True, ["no text-image reward"]),
    ("a tensor less", "text_image_reward", lambda values, _: values.pop(min(values)), True, ["lacks"]),
    ("another config", "text_image_reward", lambda _, m: m.update(config='{"hidden": 7}'), True, ["instead of"]),
    ("config damaged", "text_image_reward", lambda _, m: m.update(config="{"), True, ["'config'"]),
    ("NaN in the segmenter", "segmentation_model", nan_in, True, ["NaN or infinite"]),
    ("another segmenter", "segmentation_model", without("format"), True, ["no segmentation model of this project"]),
    ("no labels", "segmentation_model", without("labels"), True, ["'labels'"]),
    ("segmenter lacks a tensor", "segmentation_model", lambda values, _: values.pop(min(values)), True, ["lacks"]),
]


@pytest.mark.parametrize(("name", "change", "rehash", "words"), [row[1:] for row in OWN], ids=[row[0] for row in OWN])
def test_a_judge_of_our_own_with_one_fault_is_refused(tmp_path, name, change, rehash, words):
    path = rewritten(packaged(name), tmp_path / "judge.safetensors", change, rehash=rehash)
    judge = SoloConfig(kind="solo", weights=str(path)) if name == "segmentation_model" else TextImageConfig(weights=path)
    assert_refused(judge.check, str(path), *words)


def test_packaged_judges_are_good():
    quality_head.check_quality_head()
    for name in ("text_image_reward", "held_out_reward"):
        TextImageConfig(weights=packaged(name)).check()
    SoloConfig(kind="solo", weights=str(packaged("segmentation_model"))).check()
    assert all(packaged(name).is_file() for name in ("text_image_reward", "held_out_reward", "segmentation_model"))


def test_a_judge_of_this_project_is_no_teacher_of_itself(tmp_path):
    assert_refused(TextImageConfig(weights=tmp_path / "none.safetensors").check, "none.safetensors", "does not exist")
    assert_refused(TextImageConfig(weights=packaged("segmentation_model")).check, "segmentation_model.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    assert_refused(TextImageConfig(weights=tmp_path / "text.safetensors").check, "text.safetensors", "not a safetensors file")


def head_file(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    values = {name: tensor.clone() for name, tensor in PredictorHead(24).state_dict().items()}
    values = change(values) or values
    torch.save(values, path)
    return path


HEADS: list[tuple[str, Callable[[dict[str, torch.Tensor]], Any], list[str]]] = [
    ("NaN", lambda v: v.update({"layers.0.bias": torch.full((1024,), torch.nan)}), ["NaN or infinite"]),
    ("a tensor less", lambda v: v.pop("layers.7.bias").isnan().all() or None, ["lacks layers.7.bias"]),
    ("a tensor more", lambda v: v.update(x=torch.zeros(1)), ["holds x"]),
    ("another shape", lambda v: v.update({"layers.7.bias": torch.zeros(2)}), ["[2] instead of [1]"]),
    ("no tensors", lambda v: {"a": 1}, ["no table of tensors"]),
]


@pytest.mark.parametrize(("change", "words"), [row[1:] for row in HEADS], ids=[row[0] for row in HEADS])
def test_published_weights_with_one_fault_are_refused(tmp_path, change, words):
    from hypersd_pipeline.models.tensors import shapes_of

    path = head_file(tmp_path / "head.pth", change)
    assert_refused(lambda: check_weights(path, 24, lambda: shapes_of(lambda: PredictorHead(24))), str(path), *words)


class Bomb:
    """A pickle that runs code when it is opened freely."""

    def __reduce__(self):
        return (Path.touch, (Path(self.target),))

    def __init__(self, target: Path) -> None:
        self.target = str(target)


JUDGES: list[tuple[str, Callable[[Path], Callable[[], Any]], list[str]]] = [
    ("head missing", lambda f: LaionAestheticConfig(head=Weights(path=f / "none.pth")).check, ["laion_aesthetic.head", "none.pth"]),
    (
        "head of another hash",
        lambda f: LaionAestheticConfig(head=Weights(path=f / "file.pth", sha256="0" * 64)).check,
        ["laion_aesthetic.head", "file.pth", "sha256"],
    ),
    ("architecture unknown", lambda f: LaionAestheticConfig(clip_model="ViT-Z").check, ["laion_aesthetic.clip_model", "ViT-Z"]),
    ("pickled code as a reward", lambda f: ImageRewardConfig(weights=Weights(path=f / "bomb.pth")).check, ["bomb.pth", "tensors only"]),
    (
        "no tensors of ImageReward",
        lambda f: ImageRewardConfig(weights=Weights(path=f / "file.pth")).check,
        ["file.pth", "no tensor of ImageReward"],
    ),
    (
        "PickScore without its config",
        lambda f: PickScoreConfig(weights=Weights(path=f / "model.safetensors")).check,
        ["pick_score.weights", "config.json"],
    ),
    ("PickScore by another name", lambda f: PickScoreConfig(weights=Weights(path=f / "file.pth")).check, ["model.safetensors"]),
    ("mmdet's checkpoint with code", lambda f: SoloConfig(kind="solo", weights=str(f / "bomb.pth")).check, ["bomb.pth", "can run code"]),
    (
        "Inception missing",
        lambda f: FeatureConfig(kind="inception", weights=f / "none.pth").check,
        ["evaluation.features.weights", "none.pth"],
    ),
    (
        "Inception by another hash",
        lambda f: FeatureConfig(kind="inception", weights=f / "file.pth").check,
        ["evaluation.features", "file.pth", "6726825d"],
    ),
    (
        "CLIP unknown",
        lambda f: ClipConfig(model="ViT-B32", pretrained="openai").check,
        ["evaluation.clip.model", "did you mean 'ViT-B-32'?"],
    ),
    ("CLIP without weights", lambda f: ClipConfig(model="ViT-B-32").check, ["evaluation.clip.pretrained", "needs weights"]),
    (
        "CLIP's tag unknown",
        lambda f: ClipConfig(model="ViT-B-32", pretrained="openay").check,
        ["evaluation.clip.pretrained", "openay", "openai"],
    ),
]


@pytest.mark.parametrize(("judge", "words"), [row[1:] for row in JUDGES], ids=[row[0] for row in JUDGES])
def test_a_judge_with_one_fault_is_refused_and_runs_no_code(tmp_path, judge, words):
    torch.save({"x": torch.zeros(1)}, tmp_path / "file.pth")
    torch.save({"x": Bomb(tmp_path / "ran")}, tmp_path / "bomb.pth")
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert_refused(judge(tmp_path), *words)
    assert not (tmp_path / "ran").exists()


def test_inception_is_never_unpickled_freely(tmp_path):
    """Not even where the user vouches for the file by its hash."""
    import hashlib

    from hypersd_pipeline.metrics.features import load_features

    torch.save({"x": Bomb(tmp_path / "ran")}, tmp_path / "bomb.pth")
    digest = hashlib.sha256((tmp_path / "bomb.pth").read_bytes()).hexdigest()
    given = FeatureConfig(kind="inception", weights=tmp_path / "bomb.pth", sha256=digest)
    for action in (given.check, lambda: load_features(given)):
        assert_refused(action, "bomb.pth", "tensors only")
    torch.save({"x": torch.zeros(1)}, tmp_path / "small.pth")
    digest = hashlib.sha256((tmp_path / "small.pth").read_bytes()).hexdigest()
    assert_refused(FeatureConfig(kind="inception", weights=tmp_path / "small.pth", sha256=digest).check, "small.pth", "not the FID's")
    assert not (tmp_path / "ran").exists()


def feedback(trained: Path, held_out: Path) -> FeedbackConfig:
    return FeedbackConfig.model_validate(
        {
            "terms": {"reward": {"kind": "reward", "reward": {"kind": "text_image", "weights": str(trained)}, "alpha": 2.0}},
            "held_out": {"kind": "text_image", "weights": str(held_out)}, "guard": {"every": 2, "prompts": 2}, "test_images": 2,
            "lora": {"rank": 2, "target_modules": ["to_q"]}, "loop": {"steps": 1, "batch_size": 1, "learning_rate": 0.1},
        }
    )  # fmt: skip


def test_the_held_out_reward_is_none_of_those_trained_on(tmp_path):
    copy = shutil.copy(packaged("text_image_reward"), tmp_path / "other_name.safetensors")
    feedback(packaged("text_image_reward"), packaged("held_out_reward")).check_judges()
    assert_refused(feedback(packaged("text_image_reward"), Path(copy)).check_judges, "held_out", "terms.reward")
    assert_refused(feedback(packaged("held_out_reward"), packaged("text_image_reward")).check_judges, "terms.reward", "held-out reward")
    assert_refused(feedback(tmp_path / "none", packaged("held_out_reward")).check_judges, "terms.reward", "none")
    assert_refused(feedback(packaged("text_image_reward"), tmp_path / "none").check_judges, "held_out", "none")
