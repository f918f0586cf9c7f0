"""A first stage starts from a LoRA of the user's own exactly as diffusers samples with it, or says why it cannot."""

import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.adapters import AdaptedBackbone
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher
from hypersd_pipeline.models.user_lora import read_user_lora, user_lora_file

TARGETS = ("to_q", "to_v")
WEIGHTS = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny.write_sd15(tmp_path_factory.mktemp("teacher"))


def backbone_of(folder):
    return load_teacher(TeacherConfig(source=str(folder)), parts=("backbone",))


def write_peft(folder, teacher, rank=3, alpha=6):
    """As a training script of diffusers saves it: random weights, an alpha that is not the rank."""
    unet = backbone_of(teacher).backbone.module
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(TARGETS)), adapter_name="mine")
    generator = torch.Generator().manual_seed(1)
    for name, parameter in unet.named_parameters():
        if ".lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    layers = get_peft_model_state_dict(unet, adapter_name="mine")
    metadata = {"unet": {"r": rank, "lora_alpha": alpha, "target_modules": list(TARGETS)}}
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata["unet"])
    return folder


def write_kohya(file, peft_folder, alpha=6.0):
    """The same weights under kohya's names, each with its alpha."""
    tensors = {}
    for name, tensor in load_file(peft_folder / WEIGHTS).items():
        module, half = name.removeprefix("unet.").removesuffix(".weight").rsplit(".lora_", 1)
        key = "lora_unet_" + module.replace(".", "_")
        tensors[f"{key}.lora_{'down' if half == 'A' else 'up'}.weight"] = tensor.half()
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
    save_file(tensors, file)
    return file


def noise_of(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    channels, height, width = model.latent_shape
    x = torch.randn(2, channels, height, width, generator=generator)
    cond = Conditioning(torch.randn(2, 7, model.backbone.module.config.cross_attention_dim, generator=generator))
    return x, torch.tensor([10, 700]), cond


@pytest.mark.parametrize("layout", ["peft", "kohya"])
def test_the_student_starts_as_diffusers_samples_with_the_lora(tmp_path, teacher, layout):
    path = write_peft(tmp_path / "mine", teacher)
    if layout == "kohya":
        path = write_kohya(tmp_path / "kohya.safetensors", path)
    model = backbone_of(teacher)
    x, t, cond = noise_of(model)
    base = model.backbone(x, t, cond)
    lora = read_user_lora(path, model.backbone)
    adapters = AdaptedBackbone(model.backbone, model.process, rank=5, target_modules=TARGETS, start=lora)
    pipeline = StableDiffusionPipeline.from_pretrained(teacher, safety_checker=None)
    pipeline.load_lora_weights(str(path))  # the reference
    expected = pipeline.unet(x, t, encoder_hidden_states=cond.prompt_embeds).sample
    with torch.no_grad():
        adapters.use("student")
        found = adapters.backbone(x, t, cond)
        adapters.use("ema")
        averaged = adapters.backbone(x, t, cond)
    assert (expected - base).abs().max() > 0.05  # the LoRA does something
    assert torch.allclose(found, expected, atol=2e-5) and torch.equal(found, averaged)


def test_what_a_lower_rank_leaves_free_can_be_trained(tmp_path, teacher):
    model = backbone_of(teacher)
    lora = read_user_lora(write_peft(tmp_path / "mine", teacher), model.backbone)
    adapters = AdaptedBackbone(model.backbone, model.process, rank=5, target_modules=(*TARGETS, "to_k"), start=lora)
    x, t, cond = noise_of(model)
    adapters.use("student")
    adapters.backbone(x, t, cond).square().sum().backward()
    for module, a, b in adapters._pairs("student"):
        given = module.endswith(TARGETS)
        rest = slice(3 if given else 0, None)
        assert (b.data[:, rest] == 0).all() and (a.data[rest] != 0).all() and (b.grad[:, rest] != 0).any(), module


def test_a_lora_of_higher_rank_or_other_modules_says_which_key_to_change(tmp_path, teacher):
    model = backbone_of(teacher)
    lora = read_user_lora(write_peft(tmp_path / "mine", teacher), model.backbone)
    with pytest.raises(UserError, match=r"^lora\.rank: 2 is lower than the rank 3 of the LoRA that the stage starts from; raise it\.$"):
        AdaptedBackbone(model.backbone, model.process, rank=2, target_modules=TARGETS, start=lora)
    model = backbone_of(teacher)
    with pytest.raises(UserError, match=r"^lora\.target_modules: the LoRA that the stage starts from also changes .*to_v, which"):
        AdaptedBackbone(model.backbone, model.process, rank=3, target_modules=("to_q",), start=lora)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["lora_unet_down_blocks_0_x.hada_w1_a"], "is a LoHa, which is not supported"),
        (["lora_unet_down_blocks_0_x.lokr_w1"], "is a LoKr, which is not supported"),
        (["lora_unet_a.lora_down.weight", "lora_unet_a.dora_scale"], "is a DoRA, which is not supported"),
        (["lora_te_text_model_encoder_layers_0.lora_down.weight"], "also changes a text encoder"),
        (["text_encoder.layers.0.lora_A.weight"], "also changes a text encoder"),
        (["unet.elsewhere.to_q.lora_A.weight", "unet.elsewhere.to_q.lora_B.weight"], "cannot load it|are in this network"),
        (["model.weight"], "cannot load it|are in this network"),
    ],
)
def test_other_files_are_refused_with_the_reason(tmp_path, teacher, names, sentence):
    save_file({name: torch.ones(2, 2) for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=rf"^start: .*x\.safetensors.*({sentence})"):
        read_user_lora(tmp_path / "x.safetensors", backbone_of(teacher).backbone)


def test_values_that_are_not_finite_are_refused(tmp_path, teacher):
    folder = write_peft(tmp_path / "mine", teacher)
    tensors = load_file(folder / WEIGHTS)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(UserError, match="NaN or infinite"):
        read_user_lora(folder, backbone_of(teacher).backbone)


def test_the_file_is_found_or_the_sentence_says_what_is_there(tmp_path):
    with pytest.raises(UserError, match=r"^start: there is no file or folder .*none"):
        user_lora_file(tmp_path / "none")
    with pytest.raises(UserError, match=r"has 0 \.safetensors files"):
        user_lora_file(tmp_path)
    (tmp_path / "a.safetensors").touch()
    assert user_lora_file(tmp_path) == tmp_path / "a.safetensors" == user_lora_file(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").touch()
    with pytest.raises(UserError, match=r"has 2 \.safetensors files; name the LoRA's file"):
        user_lora_file(tmp_path)
    (tmp_path / "b.ckpt").touch()
    with pytest.raises(UserError, match=r"may run code when they are read"):
        user_lora_file(tmp_path / "b.ckpt")
    with pytest.raises(UserError, match=r"^start: .*a\.safetensors is damaged"):
        read_user_lora(tmp_path / "a.safetensors", None)
