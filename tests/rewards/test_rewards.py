"""Rewards: published architectures on random weights against values by hand, gradients that reach the pixels, and refusals."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import pytest
import tiny
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError
from rows import Rows
from safetensors.torch import save_file
from torch import Tensor

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.adapters import AdaptedBackbone
from hypersd_pipeline.models.dual_encoder import load_dual_encoder
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher
from hypersd_pipeline.rewards import Reward, RewardConfig, load_reward, straight_through_clamp
from hypersd_pipeline.rewards.image_reward import IGNORED, MEAN, STD, BlipShape, ImageReward, ImageRewardConfig, from_published
from hypersd_pipeline.rewards.predictor import PredictorHead
from hypersd_pipeline.rewards.preprocess import CLIP_MEAN, CLIP_STD, crop_preprocess, pad_preprocess
from hypersd_pipeline.rewards.text_image import TextImageHead, TextImageHeadConfig, save_text_image
from hypersd_pipeline.rewards.weights import Weights, read_tensors
from hypersd_pipeline.training.config import StageConfig
from hypersd_pipeline.training.stage import build_stage
from hypersd_pipeline.training.terms import Context
from hypersd_pipeline.training.terms.reward import RewardTerm

PROMPTS = ["a red fox on the left", "Two OWLS, blue background"]
CLIP = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
SMALL = BlipShape(
    image_size=32, patch_size=16, vision_width=24, vision_layers=2, vision_heads=3, text_width=16, text_layers=2, text_heads=2,
    text_hidden=20, max_positions=40,
)  # fmt: skip


def noisy_images(seed: int = 0, height: int = 48, width: int = 48) -> Tensor:
    """Pixels of which some lie outside [0, 1], as a decoder gives them."""
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 1.4 - 0.2


def spread(module: torch.nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Random weights that are large enough for every part of the network to matter."""
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(v.shape, generator=generator) * 0.2 + (0.8 if v.ndim == 1 else 0) for k, v in module.state_dict().items()}


@pytest.fixture(scope="module")
def clip_name(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny CLIP, registered with open_clip under a name."""
    path = tmp_path_factory.mktemp("open_clip") / "tiny-clip-for-tests.json"
    path.write_text(json.dumps(CLIP))
    open_clip.add_model_config(path)
    return path.stem


@pytest.fixture(scope="module")
def clip_tensors(clip_name: str) -> dict[str, Tensor]:
    return {**spread(open_clip.model.CLIP(**CLIP)), "logit_scale": torch.tensor(4.6)}


# --- the published layouts, written out by hand -------------------------------------------------------------------------------------------


def published_image_reward(shape: BlipShape, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors under the names and shapes of ImageReward.pt: BLIP's own code with these sizes."""
    d, t, h = shape.vision_width, shape.text_width, shape.text_hidden
    positions = (shape.image_size // shape.patch_size) ** 2 + 1
    sizes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, d), "pos_embed": (1, positions, d)}

    def linear(name: str, out: int, into: int) -> None:
        sizes.update({f"{name}.weight": (out, into), f"{name}.bias": (out,)})

    def norm(name: str, width: int) -> None:
        sizes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    sizes |= {"patch_embed.proj.weight": (d, 3, shape.patch_size, shape.patch_size), "patch_embed.proj.bias": (d,)}
    for i in range(shape.vision_layers):
        norm(f"blocks.{i}.norm1", d)
        linear(f"blocks.{i}.attn.qkv", 3 * d, d)
        linear(f"blocks.{i}.attn.proj", d, d)
        norm(f"blocks.{i}.norm2", d)
        linear(f"blocks.{i}.mlp.fc1", 4 * d, d)
        linear(f"blocks.{i}.mlp.fc2", d, 4 * d)
    norm("norm", d)
    sizes = {f"blip.visual_encoder.{k}": v for k, v in sizes.items()}
    text = "blip.text_encoder."
    sizes[f"{text}embeddings.word_embeddings.weight"] = (shape.vocabulary, t)
    sizes[f"{text}embeddings.position_embeddings.weight"] = (shape.max_positions, t)
    norm(f"{text}embeddings.LayerNorm", t)
    for i in range(shape.text_layers):
        layer = f"{text}encoder.layer.{i}."
        for kind, source in (("attention", t), ("crossattention", d)):
            linear(f"{layer}{kind}.self.query", t, t)
            linear(f"{layer}{kind}.self.key", t, source)
            linear(f"{layer}{kind}.self.value", t, source)
            linear(f"{layer}{kind}.output.dense", t, t)
            norm(f"{layer}{kind}.output.LayerNorm", t)
        linear(f"{layer}intermediate.dense", h, t)
        linear(f"{layer}output.dense", t, h)
        norm(f"{layer}output.LayerNorm", t)
    for number, (out, into) in {0: (1024, t), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}.items():
        linear(f"mlp.layers.{number}", out, into)
    linear("blip.vision_proj", 256, d)
    linear("blip.text_proj", 256, t)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        k: torch.randn(v, generator=generator) * (0.3 if len(v) > 1 else 0.1) + ("orm" in k and "weight" in k) for k, v in sizes.items()
    }
    return {**tensors, "blip.text_encoder.embeddings.position_ids": torch.arange(shape.max_positions)[None]}


def image_reward_by_hand(w: dict[str, Tensor], shape: BlipShape, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """ImageReward's forward pass in plain tensor algebra, on the published tensors."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / (var + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def gelu(x: Tensor) -> Tensor:
        return x * (1 + torch.erf(x / 2**0.5)) / 2

    def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, allowed: Tensor) -> Tensor:
        out = []
        for a, b, c in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
            scores = a @ b.transpose(1, 2) / a.shape[-1] ** 0.5
            out.append(scores.masked_fill(~allowed[:, None], -torch.inf).softmax(-1) @ c)
        return torch.cat(out, -1)

    b, p, d = len(pixels), shape.patch_size, shape.vision_width
    vit = "blip.visual_encoder."
    patches = pixels.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 1, 4, 5).reshape(b, -1, 3 * p * p)
    x = patches @ w[f"{vit}patch_embed.proj.weight"].reshape(d, -1).T + w[f"{vit}patch_embed.proj.bias"]
    x = torch.cat([w[f"{vit}cls_token"].expand(b, -1, -1), x], 1) + w[f"{vit}pos_embed"]
    everywhere = torch.ones(b, x.shape[1], dtype=torch.bool)
    for i in range(shape.vision_layers):
        block = f"{vit}blocks.{i}."
        q, k, v = linear(norm(x, f"{block}norm1", 1e-6), f"{block}attn.qkv").split(d, -1)
        x = x + linear(attend(q, k, v, shape.vision_heads, everywhere), f"{block}attn.proj")
        x = x + linear(gelu(linear(norm(x, f"{block}norm2", 1e-6), f"{block}mlp.fc1")), f"{block}mlp.fc2")
    image = norm(x, f"{vit}norm", 1e-6)
    text = "blip.text_encoder."
    x = w[f"{text}embeddings.word_embeddings.weight"][ids] + w[f"{text}embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = norm(x, f"{text}embeddings.LayerNorm", 1e-12)
    for i in range(shape.text_layers):
        layer = f"{text}encoder.layer.{i}."
        for kind, source, allowed in (("attention", None, mask.bool()), ("crossattention", image, everywhere)):
            name = f"{layer}{kind}."
            kv = x if source is None else source
            q, k, v = linear(x, f"{name}self.query"), linear(kv, f"{name}self.key"), linear(kv, f"{name}self.value")
            x = norm(linear(attend(q, k, v, shape.text_heads, allowed), f"{name}output.dense") + x, f"{name}output.LayerNorm", 1e-12)
        x = norm(linear(gelu(linear(x, f"{layer}intermediate.dense")), f"{layer}output.dense") + x, f"{layer}output.LayerNorm", 1e-12)
    y = x[:, 0]
    for number in (0, 2, 4, 6, 7):
        y = linear(y, f"mlp.layers.{number}")
    return (y[:, 0] - 0.16717362830052426) / 1.0333394966054072


# --- one small reward of each kind --------------------------------------------------------------------------------------------------------


def write_pick_score(folder: Path) -> Path:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 49408, "eos_token_id": 49407, "bos_token_id": 49406, "hidden_act": "gelu"}
    config = CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 8}, projection_dim=24)
    model = CLIPModel(config)
    model.load_state_dict({**spread(model), "logit_scale": torch.tensor(100.0).log()})
    model.save_pretrained(folder)
    return folder / "model.safetensors"


@pytest.fixture(scope="module")
def configs(clip_name: str, clip_tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """A configuration of every kind, on small random files in the published layouts."""
    folder = tmp_path_factory.mktemp("rewards")
    torch.save(spread(PredictorHead(24)), folder / "head.pth")
    save_file(clip_tensors, folder / "clip.safetensors")
    torch.save({"state_dict": clip_tensors}, folder / "hps.pt")
    torch.save(published_image_reward(SMALL), folder / "image_reward.pt")
    torch.manual_seed(0)
    save_text_image(TextImageHead(TextImageHeadConfig()), load_dual_encoder(), "trained", folder / "text_image.safetensors", {})
    made: list[dict[str, Any]] = [
        {
            "kind": "laion_aesthetic",
            "clip_model": clip_name,
            "head": {"path": folder / "head.pth"},
            "clip": {"path": folder / "clip.safetensors"},
        },
        {"kind": "image_reward", "weights": {"path": folder / "image_reward.pt"}, "shape": SMALL.model_dump()},
        {"kind": "pick_score", "weights": {"path": write_pick_score(folder / "pick")}},
        {"kind": "hps_v2", "clip_model": clip_name, "weights": {"path": folder / "hps.pt"}},
        {"kind": "shipped_quality"},
        {"kind": "text_image", "weights": folder / "text_image.safetensors"},
    ]
    return {config["kind"]: config for config in made}


def load(config: dict[str, Any], **options: Any) -> Reward:
    return load_reward(TypeAdapter(RewardConfig).validate_python(config), **options)


KINDS = ("laion_aesthetic", "image_reward", "pick_score", "hps_v2", "shipped_quality", "text_image")


@pytest.mark.parametrize("kind", KINDS)
def test_every_reward_scores_and_sends_gradient_to_every_pixel(kind: str, configs: dict[str, dict[str, Any]]) -> None:
    reward = load(configs[kind])
    assert reward.name == kind
    images = noisy_images().requires_grad_()
    scores = reward.score(images, PROMPTS)
    assert scores.shape == (2,) and bool(scores.isfinite().all())
    # what lies outside is scored as if clipped
    assert torch.allclose(reward.score(images.detach().clamp(0, 1), PROMPTS), scores, atol=1e-5)
    scores.sum().backward()
    gradient = images.grad
    assert gradient is not None and bool(gradient.isfinite().all())
    saturated = (images.detach() < 0) | (images.detach() > 1)
    assert saturated.float().mean() > 0.1
    for chosen in (saturated, ~saturated):
        assert float((gradient[chosen] != 0).float().mean()) > 0.9
    assert isinstance(reward, torch.nn.Module) and not reward.training
    assert all(not p.requires_grad and p.grad is None for p in reward.parameters())


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> TeacherConfig:
    return TeacherConfig(source=str(tiny.write_sd15(tmp_path_factory.mktemp("teacher"))))


@pytest.mark.parametrize("kind", KINDS)
def test_each_rewards_gradient_reaches_the_students_adapter_and_nothing_else(
    kind: str, configs: dict[str, dict[str, Any]], teacher: TeacherConfig
) -> None:
    model = load_teacher(teacher)
    adapters = AdaptedBackbone(
        model.backbone, model.process, rank=2, target_modules=("to_q", "conv1"), names=("student",), trainable=("student",)
    )
    student = adapters.parameters("student")
    with torch.no_grad():
        for parameter in student:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    config = StageConfig(
        terms=[{"kind": "reward", "reward": configs[kind], "alpha": 1e4}],
        sample={"steps": 4, "gradient_steps": 2},
        lora={"rank": 2, "target_modules": ("to_q", "conv1")},
        loop={"steps": 1, "batch_size": 2, "learning_rate": 1e-3},
    )
    rows = Rows(torch.zeros(2, 4, 8, 8), model.encode_prompts(PROMPTS), model.unconditional(), PROMPTS)
    decode = partial(model.decode, clip=False)
    context = Context(
        adapters, adapters.denoiser("student"), adapters.denoiser(None), rows, model.latent_shape, batch=2, device=model.device,
        decode=decode,
    )  # fmt: skip
    stage = build_stage(config, context, lambda: adapters.use("student"))
    ((_, [(_, term)]),) = stage.parts
    loss, scalars = stage(torch.Generator().manual_seed(0))
    assert scalars.keys() == {f"reward_{kind}"}
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in student)
    assert sum(float(p.grad.abs().sum()) for p in student if p.grad is not None) > 0
    assert isinstance(term, RewardTerm) and isinstance(term.reward, torch.nn.Module) and term.reward.name == kind
    ours = {id(p) for p in student}
    others = [*model.backbone.module.parameters(), *model.vae.parameters(), *term.reward.parameters()]
    assert all(p.grad is None for p in others if id(p) not in ours)


@pytest.mark.parametrize("kind", ["image_reward", "pick_score", "hps_v2", "text_image"])
def test_prompts_matter_one_by_one(kind: str, configs: dict[str, dict[str, Any]]) -> None:
    reward = load(configs[kind])
    with torch.no_grad():
        both, swapped = reward.score(noisy_images(), PROMPTS), reward.score(noisy_images(), PROMPTS[::-1])
        alone = torch.cat([reward.score(noisy_images()[i : i + 1], [PROMPTS[i]]) for i in range(2)])
    assert bool(((both - swapped).abs() > 1e-6).all())
    assert torch.allclose(both, alone, atol=1e-4)


def test_wrong_batches_are_refused(configs: dict[str, dict[str, Any]]) -> None:
    reward = load(configs["shipped_quality"])
    with pytest.raises(ValueError, match="a prompt for each image"):
        reward.score(noisy_images(), ["one"])
    with pytest.raises(ValueError, match="float images"):
        reward.score(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["one"])


def test_straight_through_clamp_clips_and_passes_all_gradient() -> None:
    x = torch.tensor([-3.0, 0.0, 0.25, 1.0, 1.7], requires_grad=True)
    y = straight_through_clamp(x)
    assert y.tolist() == [0, 0, 0.25, 1, 1]
    (y * torch.arange(1.0, 6)).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1, 2, 3, 4, 5]


# --- values ------------------------------------------------------------------------------------------------------------------------------


def test_predictor_head_is_the_product_of_its_layers() -> None:
    head = PredictorHead(768)
    tensors = spread(head)
    assert list(tensors) == [f"layers.{i}.{kind}" for i in (0, 2, 4, 6, 7) for kind in ("weight", "bias")]
    assert [list(v.shape) for k, v in tensors.items() if "weight" in k] == [[1024, 768], [128, 1024], [64, 128], [16, 64], [1, 16]]
    head.load_state_dict(tensors)
    x = F.normalize(torch.randn(3, 768, generator=torch.Generator().manual_seed(1)), dim=-1)
    y = x.double()
    for i in (0, 2, 4, 6, 7):
        y = y @ tensors[f"layers.{i}.weight"].double().T + tensors[f"layers.{i}.bias"].double()
    with torch.no_grad():
        assert torch.allclose(head.eval()(x).double(), y[:, 0], rtol=1e-4)


def test_laion_aesthetic_by_hand(configs: dict[str, dict[str, Any]], clip_tensors: dict[str, Tensor]) -> None:
    """open_clip's own preprocessing of an 8-bit image, its normalised embedding, and the head as one matrix."""
    from open_clip.transform import image_transform
    from torchvision.transforms.functional import to_pil_image

    model = open_clip.model.CLIP(**CLIP)
    model.load_state_dict(clip_tensors)
    image = torch.randint(0, 256, (3, 64, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    preprocess = image_transform(32, is_train=False, mean=CLIP_MEAN, std=CLIP_STD)
    head = PredictorHead(24)
    head.load_state_dict(spread(head))
    with torch.no_grad():
        y = model.eval().encode_image(preprocess(to_pil_image(image))[None], normalize=True)
        for layer in head.layers:
            y = F.linear(y, layer.weight, layer.bias) if isinstance(layer, torch.nn.Linear) else y
        got = load(configs["laion_aesthetic"]).score(image[None].float() / 255, ["ignored"])
    assert float(got) == pytest.approx(float(y), rel=1e-2)  # PIL rounds to 8 bits after resizing


def test_the_published_sizes_are_the_real_ones() -> None:
    """ImageReward v1.0 in full, on the meta device: every published name finds its place, with the same shape."""
    with torch.device("meta"):
        model = ImageReward(BlipShape())
    own = {k: v.shape for k, v in model.state_dict().items()}
    with torch.device("meta"):
        published = _meta_published()
    assert {k: v.shape for k, v in from_published(published, Path("ImageReward.pt")).items()} == own
    assert sum(v.numel() for v in model.state_dict().values()) == 446_206_689


def _meta_published() -> dict[str, Tensor]:
    """Names and shapes of the full checkpoint without its 1.8 GB: layers of the small one, renumbered and widened."""
    shape = BlipShape()
    small = SMALL.model_copy(update={"vision_layers": 1, "text_layers": 1})
    wide = {
        name: tuple(_widen(name, i, side, shape) for i, side in enumerate(v.shape)) for name, v in published_image_reward(small).items()
    }
    full: dict[str, tuple[int, ...]] = {}
    for name, sizes in wide.items():
        layers = shape.vision_layers if ".blocks.0." in name else shape.text_layers if ".layer.0." in name else 1
        for i in range(layers):
            full[name.replace(".blocks.0.", f".blocks.{i}.").replace(".layer.0.", f".layer.{i}.")] = sizes
    return {name: torch.empty(sizes) for name, sizes in full.items()}


def _widen(name: str, axis: int, side: int, shape: BlipShape) -> int:
    """BLIP's large sizes in place of the small ones. The small ones are all different numbers."""
    if name.endswith("pos_embed") and axis == 1:
        return 197  # 14 x 14 patches and the class
    if name.startswith("mlp.") and not (name == "mlp.layers.0.weight" and axis == 1):
        return side
    if ("patch_embed" in name and axis > 1) or ("_proj." in name and axis == 0):
        return side
    widths = {24: 1024, 72: 3072, 96: 4096, 16: 768, 20: 3072, 40: 512}
    return widths.get(side, side)


def test_image_reward_equals_plain_tensor_algebra(configs: dict[str, dict[str, Any]]) -> None:
    from transformers import BertTokenizer

    from hypersd_pipeline.models.dual_encoder import minilm_folder

    vocabulary = (minilm_folder() / "vocab.txt").read_bytes()  # bert-base-uncased's, by its sha256
    assert hashlib.sha256(vocabulary).hexdigest() == "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"
    reward, published = load(configs["image_reward"]), published_image_reward(SMALL)
    prompts = ["hello world", "an owl " * 40]
    options: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": 35, "return_tensors": "pt"}
    tokens = BertTokenizer.from_pretrained(minilm_folder())(prompts, **options)
    assert tokens.input_ids[0, :5].tolist() == [101, 7592, 2088, 102, 0] and tokens.input_ids[1, -1] == 102
    images = noisy_images(height=40, width=64)
    expected = image_reward_by_hand(published, SMALL, crop_preprocess(images, 32), tokens.input_ids, tokens.attention_mask)
    assert torch.allclose(reward.score(images, prompts), expected, atol=1e-4)
    assert float((expected[0] - expected[1]).abs()) > 1e-2 and (MEAN, STD) == (0.16717362830052426, 1.0333394966054072)


def test_image_reward_accounts_for_every_published_tensor(tmp_path: Path) -> None:
    published = published_image_reward(SMALL)
    ours = from_published(published, tmp_path)
    assert len(ours) == len(published) - len(IGNORED) and set(ours) == set(ImageReward(SMALL).state_dict())

    def refuse(tensors: dict[str, Tensor], message: str) -> None:
        torch.save(tensors, tmp_path / "weights.pt")
        with pytest.raises(UserError, match=message):
            load_reward(ImageRewardConfig(weights=Weights(path=tmp_path / "weights.pt"), shape=SMALL))

    refuse({**published, "blip.itm_head.weight": torch.zeros(2, 16)}, r"blip\.itm_head\.weight \(of 1\) is no tensor of ImageReward")
    lacking = {k: v for k, v in published.items() if k != "blip.visual_encoder.blocks.1.attn.qkv.bias"}
    refuse(lacking, r"vision\.encoder\.layers\.1\.self_attn\.qkv\.bias is missing")
    refuse({**published, "mlp.layers.7.bias": torch.zeros(2)}, r"mlp\.layers\.7\.bias has shape \[2\] and not \[1\]")


def test_pick_score_equals_transformers_own_logits(configs: dict[str, dict[str, Any]]) -> None:
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(configs["pick_score"]["weights"]["path"].parent).eval()
    tokens = open_clip.SimpleTokenizer()(PROMPTS)
    ids = torch.where(torch.cumsum((tokens == 49407).long(), 1) > 0, 49407, tokens)  # transformers pads with the end token
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=crop_preprocess(noisy_images(), 32)).logits_per_image.diagonal()
        got = load(configs["pick_score"]).score(noisy_images(), PROMPTS)
    assert torch.allclose(got, expected, atol=1e-3) and float(expected.abs().max()) <= 100


def test_hps_v2_is_a_hundred_times_the_cosine(configs: dict[str, dict[str, Any]], clip_tensors: dict[str, Tensor]) -> None:
    model = open_clip.model.CLIP(**CLIP)
    model.load_state_dict(clip_tensors)
    with torch.no_grad():
        image = model.eval().encode_image(pad_preprocess(noisy_images(), 32))
        text = model.encode_text(open_clip.SimpleTokenizer()(PROMPTS))
        expected = 100 * F.cosine_similarity(image, text)
        assert torch.allclose(load(configs["hps_v2"]).score(noisy_images(), PROMPTS), expected, atol=1e-3)


def test_preprocessing_is_torchvisions() -> None:
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize

    bicubic = Compose([Resize(32, InterpolationMode.BICUBIC), CenterCrop(32)])
    for height, width in ((48, 61), (33, 20), (32, 32)):
        images = noisy_images(height=height, width=width).clamp(0, 1)
        expected = Normalize(CLIP_MEAN, CLIP_STD)(bicubic(images).clamp(0, 1))
        assert torch.allclose(crop_preprocess(images, 32), expected, atol=1e-5), (height, width)
    assert torch.equal(pad_preprocess(noisy_images(), 32), crop_preprocess(noisy_images(), 32))
    black = pad_preprocess(torch.ones(1, 3, 16, 64), 32)
    unit = black * torch.tensor(CLIP_STD).view(1, 3, 1, 1) + torch.tensor(CLIP_MEAN).view(1, 3, 1, 1)
    assert torch.allclose(unit[0, :, :12], torch.zeros(3, 12, 32), atol=1e-6) and torch.allclose(unit[0, :, 12:20], torch.ones(3, 8, 32))


# --- files -------------------------------------------------------------------------------------------------------------------------------


def test_missing_files_and_wrong_hashes_are_named(configs: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"hps_v2\.weights: .*hps\.pt has sha256 .*, not 0{64}"):
        load({**configs["hps_v2"], "weights": {"path": configs["hps_v2"]["weights"]["path"], "sha256": "0" * 64}})
    gone = {"path": tmp_path / "gone.pt"}
    for kind, key in (("laion_aesthetic", "head"), ("laion_aesthetic", "clip"), ("image_reward", "weights"), ("hps_v2", "weights")):
        with pytest.raises(UserError, match=rf"{kind}\.{key}: .*gone\.pt does not exist"):
            load({**configs[kind], key: gone})
    with pytest.raises(UserError, match=r"text_image\.weights: .*gone\.pt does not exist; run 'kedro run --pipelines reward_models'"):
        load({"kind": "text_image", "weights": tmp_path / "gone.pt"})
    (tmp_path / "model.safetensors").write_bytes(configs["pick_score"]["weights"]["path"].read_bytes())
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        load({"kind": "pick_score", "weights": {"path": tmp_path / "model.safetensors"}})


def test_only_tables_of_tensors_are_read(tmp_path: Path, clip_name: str) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(UserError, match="tensors only"):
        read_tensors(tmp_path / "module.pt")
    torch.save({"weight": "text"}, tmp_path / "text.pt")
    with pytest.raises(UserError, match="no table of tensors"):
        read_tensors(tmp_path / "text.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(UserError, match="fetch the file again"):
        read_tensors(tmp_path / "cut.safetensors")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="not the weights of this architecture"):
        load({"kind": "hps_v2", "clip_model": clip_name, "weights": {"path": tmp_path / "other.safetensors"}})
    with pytest.raises(UserError, match="open_clip has no architecture 'no-such'"):
        load({"kind": "hps_v2", "clip_model": "no-such"})


def test_held_out_reward_and_foreign_files_are_not_trained_on(tmp_path: Path) -> None:
    encoder, head = load_dual_encoder(), TextImageHead(TextImageHeadConfig(inputs="features", embed_dim=8, hidden=4))
    path = tmp_path / "reward.safetensors"
    save_text_image(head, encoder, "held_out", path, {})
    config = {"kind": "text_image", "weights": path}
    with pytest.raises(UserError, match="is the held-out reward"):
        load(config)
    assert load(config, to_train_on=False).score(noisy_images(), PROMPTS).shape == (2,)
    from hypersd_pipeline.models.quality_head import SHIPPED

    with pytest.raises(UserError, match="is no text-image reward"):
        load({"kind": "text_image", "weights": SHIPPED})
    encoder.clip.logit_scale.data += 1
    save_text_image(head, encoder, "trained", path, {})
    with pytest.raises(UserError, match="another dual encoder"):
        load(config)


def test_configurations_refuse_what_they_do_not_know() -> None:
    for wrong in ({"kind": "beauty"}, {"kind": "hps_v2", "weihgts": {}}, {"kind": "hps_v2", "weights": {"repo": "a/b"}}):
        with pytest.raises(ValidationError):
            TypeAdapter(RewardConfig).validate_python(wrong)
