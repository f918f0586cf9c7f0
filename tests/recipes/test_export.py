"""An export is read back by diffusers, onnxruntime and this project as the model that was trained."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny
import torch
import unets
from diffusers import DDIMScheduler, UNet2DConditionModel
from huggingface_hub import ModelCard, constants
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.export.release import ExportConfig
from hypersd_pipeline.models.contract import Contract
from hypersd_pipeline.models.lora import LoRA, merge_lora
from hypersd_pipeline.models.one_step import write_network
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher
from hypersd_pipeline.models.user_lora import read_user_lora
from hypersd_pipeline.recipes.export import export_lora, export_network, publish

GRID = Image.new("RGB", (8, 8))
METRICS = {"clip_score/4_steps": 31.5, "clip_score/4_steps_low": 31.0, "clip_score/4_steps_high": 32.0}


def a_teacher(folder: Path, layout: str) -> TeacherConfig:
    """A tiny teacher. SDXL's blocks are in the order of the real one, on which kohya's numbers depend."""
    path = tiny.write_teacher(folder, layout)
    if layout == "sdxl":
        small = {"sample_size": 8, "block_out_channels": (8, 16, 16), "attention_head_dim": 2, "transformer_layers_per_block": (1, 1, 2)}
        small |= {"cross_attention_dim": 80, "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 40}
        torch.manual_seed(0)
        UNet2DConditionModel(**{**unets.SDXL, **small, "norm_num_groups": 4}).save_pretrained(path / "unet")
    return TeacherConfig(source=str(path))


def a_lora(config: TeacherConfig, contract: Contract, rank: int = 3) -> LoRA:
    """Random weights on everything that the released LoRAs change, as a stage hands them on."""
    teacher, generator, tensors = load_teacher(config, ("backbone",), "cpu"), torch.Generator().manual_seed(1), {}
    for name, layer in teacher.backbone.module.named_modules():
        if name.endswith(unets.TARGETS) and hasattr(layer, "weight"):
            rows, *columns = layer.weight.shape
            tensors[f"unet.{name}.lora_A.weight"] = torch.randn(rank, *columns, generator=generator) * 0.1
            tensors[f"unet.{name}.lora_B.weight"] = torch.randn(rows, rank, *(1 for _ in columns[1:]), generator=generator) * 0.1
    metadata = {
        "teacher": config.source,
        "method": "TSCD",
        "data_rows": "abc",
        "sampling_contract": contract.to_json(teacher.scheduler_config()),
    }
    return LoRA(tensors, metadata)


def written(folder: Path, lora: LoRA, teacher: TeacherConfig, **values: Any) -> Path:
    export_lora(lora, teacher, ExportConfig(license="mit", **values), METRICS, GRID)(folder)
    return folder


def outputs(unet: Any, cond: Conditioning) -> torch.Tensor:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    added = {} if cond.pooled is None else {"added_cond_kwargs": {"text_embeds": cond.pooled, "time_ids": cond.sizes}}
    with torch.no_grad():
        return unet(x, torch.tensor([999, 259]), encoder_hidden_states=cond.prompt_embeds, **added).sample


@pytest.mark.parametrize("layout", ["sd15", "sdxl"])
def test_both_layouts_read_back_equal_and_compute_the_same_in_diffusers(tmp_path, layout):
    config = a_teacher(tmp_path, layout)
    lora = a_lora(config, Contract(4))
    folder = written(tmp_path / "export", lora, config, formats=["diffusers", "kohya"], base_model="owner/base")
    teacher = load_teacher(config, ("backbone", "text"), "cpu")
    for file in ("pytorch_lora_weights.safetensors", f"Hyper-{layout.upper()}-4steps-lora.safetensors"):
        found = read_user_lora(folder / file, teacher.backbone)
        assert found.tensors.keys() == lora.tensors.keys()
        assert all(torch.equal(found.tensors[name], tensor) for name, tensor in lora.tensors.items())
    cond = teacher.encode_prompts(tiny.CAPTIONS[:2])
    plain = outputs(teacher.backbone.module, cond)
    merge_lora(teacher.backbone.module, lora)
    merged = outputs(teacher.backbone.module, cond)
    assert (merged - plain).abs().max() > 0.01
    assert _by_the_formula(folder / f"Hyper-{layout.upper()}-4steps-lora.safetensors") == pytest.approx(_by_merging(lora), rel=1e-5)
    for name in (None, f"Hyper-{layout.upper()}-4steps-lora.safetensors"):  # diffusers finds its own file in the folder by itself
        pipeline = tiny.load_pipeline(Path(config.source))
        pipeline.load_lora_weights(folder, **({} if name is None else {"weight_name": name}))
        torch.testing.assert_close(outputs(pipeline.unet, cond), merged, rtol=1e-4, atol=1e-4)


def _by_the_formula(file: Path) -> list[float]:
    """What ComfyUI, A1111 and sd-scripts add to the weights: alpha / rank * up @ down. The norm of each addition."""
    tensors = load_file(file)
    norms = []
    for name in {key.partition(".")[0] for key in tensors}:
        down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
        norms.append(float((tensors[f"{name}.alpha"] / len(down) * up.flatten(1) @ down.flatten(1)).norm()))
    return sorted(norms)


def _by_merging(lora: LoRA) -> list[float]:
    """The norms of what the project itself adds."""
    return sorted(float((b.flatten(1) @ a.flatten(1)).norm()) for a, b in lora.modules().values())


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> tuple[Path, TeacherConfig, LoRA]:
    """All formats of one LoRA."""
    folder = tmp_path_factory.mktemp("everything")
    config = a_teacher(folder, "sd15")
    lora = a_lora(config, Contract(4))
    return written(folder / "export", lora, config, base_model="owner/base"), config, lora


def test_the_fused_network_computes_what_the_lora_does(everything):
    folder, config, lora = everything
    teacher = load_teacher(config, ("backbone", "text"), "cpu")
    cond = teacher.encode_prompts(tiny.CAPTIONS[:2])
    merge_lora(teacher.backbone.module, lora)
    fused = UNet2DConditionModel.from_pretrained(folder / "unet", use_safetensors=True)
    assert torch.equal(outputs(fused, cond), outputs(teacher.backbone.module, cond))


def test_onnxruntime_computes_the_same_for_another_batch_and_size(everything):
    import onnxruntime

    folder, config, _ = everything
    session = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    cond = load_teacher(config, ("text",), "cpu").encode_prompts(tiny.CAPTIONS)
    x, t = torch.randn(3, 4, 16, 8, generator=torch.Generator().manual_seed(3)), torch.tensor([999, 500, 1])
    given = {"sample": x, "timestep": t, "encoder_hidden_states": cond.prompt_embeds}
    (found,) = session.run(["out_sample"], {name: tensor.numpy() for name, tensor in given.items()})
    with torch.no_grad():
        expected = UNet2DConditionModel.from_pretrained(folder / "unet")(x, t, cond.prompt_embeds).sample
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)
    assert json.loads((folder / "onnx" / "check.json").read_text())["difference"] < 1e-5
    assert Contract.read(session.get_modelmeta().custom_metadata_map["sampling_contract"]) == Contract(4)


def test_every_file_carries_the_contract_and_none_a_path(everything):
    folder, config, _ = everything
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert set(files) == {
        "README.md", "grid.png", "pytorch_lora_weights.safetensors", "Hyper-SD15-4steps-lora.safetensors", "scheduler_config.json",
        "sampling_contract.json", "comfyui/4steps.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
        "onnx/model.onnx", "onnx/model.onnx.data", "onnx/check.json",
    }  # fmt: skip
    for name in ("pytorch_lora_weights.safetensors", "Hyper-SD15-4steps-lora.safetensors"):
        with safe_open(files[name], framework="pt") as file:
            metadata = file.metadata()
        assert Contract.read(metadata["sampling_contract"]) == Contract(4)
        assert json.loads(metadata["sampling_timesteps"]) == {"4": [999, 749, 499, 249]}
    assert json.loads(files["sampling_contract.json"].read_text())["timesteps_by_steps"] == {"4": [999, 749, 499, 249]}
    scheduler = DDIMScheduler.from_pretrained(folder)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    here = [str(Path(config.source).parent), str(Path(__file__).parents[2]), str(Path(torch.__file__).parents[1])]
    for name, path in files.items():
        content = path.read_bytes()
        assert not [place for place in here if place.encode() in content], name
    assert ModelCard.load(files["README.md"]).data.base_model == "owner/base"
    modes = {path.stat().st_mode & 0o777 for path in files.values()}
    assert len(modes) == 1, "all files are readable alike"


def test_half_precision_halves_the_files_and_rounds_no_more_than_it_must(tmp_path):
    config = a_teacher(tmp_path, "sd15")
    lora = a_lora(config, Contract(4))
    folder = written(tmp_path / "export", lora, config, formats=["kohya", "unet"], dtype="float16")
    backbone = load_teacher(config, ("backbone",), "cpu").backbone
    found = read_user_lora(folder / "Hyper-SD15-4steps-lora.safetensors", backbone)
    assert all(torch.equal(found.tensors[name], tensor.half().float()) for name, tensor in lora.tensors.items())
    merge_lora(backbone.module, lora)
    expected = {name: tensor.half() for name, tensor in backbone.module.state_dict().items()}
    with safe_open(folder / "unet" / "diffusion_pytorch_model.safetensors", framework="pt") as file:
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in expected.items())


def test_a_one_step_network_is_exported_without_a_lora(tmp_path):
    config = a_teacher(tmp_path, "sd15")
    teacher = load_teacher(config, ("backbone",), "cpu")
    contract = Contract(1, only_timestep=800).to_json(teacher.scheduler_config())
    with torch.no_grad():
        teacher.backbone.module.conv_out.bias.add_(1.0)
    (tmp_path / "trained").mkdir()
    write_network(tmp_path / "trained", teacher.backbone, json.loads(contract), {"teacher": config.source, "data_rows": "abc"})
    values = {"license": "mit", "base_model": "owner/base"}
    export_network(tmp_path / "trained", config, ExportConfig(**values, formats=["diffusers", "kohya"]), {}, GRID)(tmp_path / "export")
    fused = UNet2DConditionModel.from_pretrained(tmp_path / "export" / "unet")
    assert torch.equal(fused.conv_out.bias, teacher.backbone.module.conv_out.bias)
    parsed = ModelCard.load(tmp_path / "export" / "README.md")
    assert parsed.data.base_model_relation == "finetune" and parsed.text.strip().startswith("# Hyper-SD15-1step-Unet")
    assert "LCMScheduler" in parsed.text and "timesteps=[800]" in parsed.text
    assert sorted(path.name for path in (tmp_path / "export").iterdir() if path.is_dir()) == ["comfyui", "unet"]


def test_what_is_missing_is_said_before_the_network_is_read(tmp_path):
    config = a_teacher(tmp_path, "sd15")
    lora = a_lora(config, Contract(4))
    (tmp_path / "sd15" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"^export\.push_to_hub: the card needs the teacher's hub id"):
        export_lora(lora, config, ExportConfig(license="mit", push_to_hub="me"), METRICS, GRID)


def test_a_failed_export_leaves_the_old_folder(tmp_path):
    config = a_teacher(tmp_path, "sd15")
    folder = written(tmp_path / "export", a_lora(config, Contract(4)), config, formats=["diffusers"])
    before = sorted(path.name for path in folder.iterdir())
    lora = a_lora(config, Contract(4))
    broken = LoRA({name: tensor.fill_(torch.nan) for name, tensor in lora.tensors.items()}, lora.metadata)
    with pytest.raises(UserError, match="NaN or infinite"):
        written(folder, broken, config, formats=["diffusers"])
    assert sorted(path.name for path in folder.iterdir()) == before and [p.name for p in tmp_path.glob(".*")] == []


class Hub(BaseHTTPRequestHandler):
    """The calls of the hub that an upload of small files makes. It takes everything, or refuses the token."""

    refuses = False
    seen: ClassVar[dict[str, Any]] = {}

    def do_POST(self) -> None:
        body, home = self.rfile.read(int(self.headers.get("Content-Length") or 0)), f"{constants.ENDPOINT}/me/Hyper-SD15-4steps-lora"
        if self.path == "/api/repos/create":
            self.seen["created"] = json.loads(body)
            self.answer({"url": home})
        elif "/preupload/" in self.path:
            named = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in named]})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            self.seen["commit"] = (self.path, {line["value"]["path"] for line in lines if line["key"] == "file"})
            self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": f"{home}/commit/0"})
        else:
            self.answer({})

    def do_GET(self) -> None:
        self.answer({"id": "me/name", "sha": "0" * 40, "siblings": []})

    def answer(self, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self.send_response(401 if self.refuses else 200)
        self.send_header("Content-Length", str(len(text)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch) -> Iterator[type[Hub]]:
    """A hub of our own on this machine."""
    kind = type("Hub", (Hub,), {"seen": {}})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
        yield kind
        server.shutdown()


def test_nothing_is_uploaded_without_the_flag_and_all_files_with_it(tmp_path, hub):
    config = a_teacher(tmp_path, "sd15")
    folder = written(tmp_path / "export", a_lora(config, Contract(4)), config, formats=["kohya"], base_model="owner/base")
    publish(folder, ExportConfig(license="mit"))
    assert not hub.seen
    publish(folder, ExportConfig(license="mit", push_to_hub="me"))
    names = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    created, (path, files) = hub.seen["created"], hub.seen["commit"]
    assert (created["organization"], created["name"]) == ("me", "Hyper-SD15-4steps-lora") and "private" in json.dumps(created)
    assert path == "/api/models/me/Hyper-SD15-4steps-lora/commit/main" and files == names


def test_a_hub_that_refuses_is_one_sentence(tmp_path, hub):
    hub.refuses = True
    (tmp_path / "sampling_contract.json").write_text('{"name": "Hyper-SD15-4steps-lora"}')
    with pytest.raises(UserError, match=r"^export\.push_to_hub: me/Hyper-SD15-4steps-lora could not be written \(\w+\); check the network"):
        publish(tmp_path, ExportConfig(license="mit", push_to_hub="me"))
