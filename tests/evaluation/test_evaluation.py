"""The evaluation on a random teacher: same noise for the same prompt, splits kept apart, and what reaches the table."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from ranks import on_ranks
from tiny import write_teacher

import hypersd_pipeline
from hypersd_pipeline.data.rows import Manifest, Row
from hypersd_pipeline.data.twemoji import TwemojiConfig, make_scene
from hypersd_pipeline.diffusion.grids import trailing_timesteps
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.evaluation.bench import Bench, evaluate_lora, evaluate_teacher, prepare_reference
from hypersd_pipeline.evaluation.reference import choose_rows, read_reference, reference_key
from hypersd_pipeline.evaluation.results import MODELS, at_a_glance, last_words, summarise_models
from hypersd_pipeline.evaluation.sampling import batches, generate, prompt_noise, sample
from hypersd_pipeline.evaluation.scores import read_scores
from hypersd_pipeline.evaluation.ways import SamplingWaysConfig, measure_sampling
from hypersd_pipeline.files import file_sha256
from hypersd_pipeline.metrics.config import DiversityConfig, EvaluationConfig
from hypersd_pipeline.metrics.features import EfficientNetLite0
from hypersd_pipeline.metrics.frechet import frechet_distance
from hypersd_pipeline.metrics.scorer import Scorer
from hypersd_pipeline.models.contract import Contract
from hypersd_pipeline.models.lora import LoRA
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher
from hypersd_pipeline.pipelines.evaluation.pipeline import create_pipeline
from hypersd_pipeline.rewards import load_reward
from hypersd_pipeline.rewards.shipped_quality import ShippedQualityConfig
from hypersd_pipeline.rewards.text_image import TextImageConfig
from hypersd_pipeline.training.distributed import ComputeConfig
from hypersd_pipeline.training.processes import Place

CONFIG = EvaluationConfig(
    samples=10, unseen_samples=6, batch_size=4, student_steps=(1, 2), teacher_steps=(1, 3), bootstrap=100, grid_prompts=3,
    diversity=DiversityConfig(prompts=5, seeds=3),
)  # fmt: skip
JUDGES = Path(hypersd_pipeline.__file__).parent / "assets/judges"
N = {"test": 12, "test_unseen": 6}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="module")
def teacher(work: Path) -> TeacherConfig:
    return TeacherConfig(source=str(write_teacher(work, "sd15")))


@pytest.fixture(scope="module")
def manifest(work: Path) -> Manifest:
    splits = {}
    for split, n in N.items():
        rows = []
        for i in range(n):
            scene = make_scene(TwemojiConfig(), split, i)  # type: ignore[arg-type]
            Image.fromarray(scene.image).save(work / f"{split}_{i}.png")
            rows.append(Row(f"{i}", f"{split}_{i}.png", (scene.caption,), 64, 64, len(scene.names), "0"))
        splits[split] = tuple(rows)
    return Manifest(work, splits)


@pytest.fixture(scope="module")
def reference(work: Path, manifest: Manifest, teacher: TeacherConfig) -> Path:
    folder = work / "reference"
    folder.mkdir()
    prepare_reference(manifest, teacher, CONFIG)(folder)
    return folder


def lora(teacher: TeacherConfig, scale: float, **contract: Any) -> LoRA:
    """Rank 2 on every self-attention query, in diffusers' format."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, parameter in load_teacher(teacher, parts=("backbone",)).backbone.module.named_parameters():
        if name.endswith("attn1.to_q.weight"):
            base = f"unet.{name.removesuffix('.weight')}"
            tensors[f"{base}.lora_A.weight"] = torch.randn(2, parameter.shape[1], generator=generator)
            tensors[f"{base}.lora_B.weight"] = scale * torch.randn(parameter.shape[0], 2, generator=generator)
    assert tensors
    return LoRA(tensors, {"sampling_contract": json.dumps({"steps": 4, "guidance_scale": 1.0, **contract})})


def test_noise_depends_on_seed_and_prompt_only() -> None:
    shape = (4, 8, 8)
    assert torch.equal(prompt_noise(range(6), shape, 1), torch.cat([prompt_noise(range(2), shape, 1), prompt_noise(range(2, 6), shape, 1)]))
    assert not torch.equal(prompt_noise(range(1), shape, 1), prompt_noise(range(1), shape, 2))
    assert not torch.equal(prompt_noise(range(1), shape, 1), prompt_noise(range(1, 2), shape, 0))


@pytest.mark.parametrize("layout", ["sd15", "sdxl"])
def test_images_do_not_depend_on_the_batch_size(tmp_path: Path, layout: Any) -> None:
    loaded = load_teacher(TeacherConfig(source=str(write_teacher(tmp_path, layout))))
    cond, guided = loaded.encode_prompts(["a fox", "two cats", "an owl"]), loaded.denoiser().guided(loaded.unconditional(1), 3.0)
    one, all_ = (torch.cat(list(generate(loaded, cond, trailing_timesteps(2), seed=0, batch_size=b, denoiser=guided))) for b in (1, 3))
    plain = torch.cat(list(generate(loaded, cond, trailing_timesteps(2), seed=0, batch_size=3)))
    assert one.shape == (3, 3, 64, 64) and torch.allclose(one, all_, atol=1e-4)
    assert not torch.allclose(plain, all_, atol=1e-4)  # the guidance does something


def test_reference_holds_the_splits_apart(reference: Path, manifest: Manifest, teacher: TeacherConfig) -> None:
    splits = read_reference(reference, reference_key(CONFIG, load_teacher(teacher, parts=("vae",))))
    assert {name: len(split) for name, split in splits.items()} == {"test": 10, "test_unseen": 6}
    assert splits["test"].prompts == [row.captions[0] for row in choose_rows(manifest.splits["test"], 10, 0)]
    assert splits["test"].real.features.shape == splits["test"].recon.features.shape == (10, 1280)
    assert not torch.equal(splits["test"].real.features, splits["test"].recon.features)


def test_what_rows_share_is_made_once(reference: Path, teacher: TeacherConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bench encodes no text for the metrics, and its decoder's layout changes rounding only."""
    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "text_embeddings", lambda *args: pytest.fail("the reference has them"))
        bench = Bench.load(teacher, reference, CONFIG)
    split = bench.splits["test"]
    assert torch.equal(split.texts, bench.scorer.text_embeddings(split.prompts))
    latents = torch.randn(2, *bench.teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    decoder = bench.teacher.vae.decoder.conv_out.weight
    assert decoder.is_contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        torch.testing.assert_close(bench.teacher.decode(latents), load_teacher(teacher).decode(latents), rtol=0, atol=1e-5)


def test_stale_reference_is_refused(reference: Path, teacher: TeacherConfig, manifest: Manifest) -> None:
    loaded = load_teacher(teacher, parts=("vae",))
    with pytest.raises(UserError, match="other seed; run prepare_reference again"):
        read_reference(reference, reference_key(CONFIG.model_copy(update={"seed": 5}), loaded))
    with pytest.raises(UserError, match="other data; run prepare_reference again"):
        read_reference(reference, {"data": "the key of another manifest"})
    assert read_reference(reference, {"data": manifest.key}).keys() == {"test", "test_unseen"}
    with pytest.raises(UserError, match="no such file"):
        read_reference(reference / "nowhere")


def test_validation_rows_stand_for_the_test_images(reference: Path, manifest: Manifest, teacher: TeacherConfig, tmp_path: Path) -> None:
    """Here with two manifests of the same images: once they are the split ``test``, once ``val``."""
    config = CONFIG.model_copy(update={"split": "val"})
    with pytest.raises(UserError, match="the split 'val' has 0 good rows"):
        prepare_reference(manifest, teacher, config)
    splits = {"val": manifest.splits["test"], "test": manifest.splits["test"][:1], "test_unseen": manifest.splits["test_unseen"]}
    prepare_reference(Manifest(manifest.root, splits), teacher, config)(tmp_path)
    loaded = load_teacher(teacher, parts=("vae",))
    chosen = read_reference(tmp_path, reference_key(config, loaded))["test"]
    assert chosen.prompts == read_reference(reference)["test"].prompts
    assert torch.equal(chosen.real.features, read_reference(reference)["test"].real.features)
    with pytest.raises(UserError, match="other split; run prepare_reference again"):
        read_reference(reference, reference_key(config, loaded))


def test_rewards_are_metrics_of_every_row_and_the_packaged_head_may_be_left_out(
    work: Path, manifest: Manifest, teacher: TeacherConfig
) -> None:
    reward = TextImageConfig(weights=JUDGES / "text_image_reward.safetensors")
    config = CONFIG.model_copy(update={"rewards": (reward,), "image_quality": False, "teacher_steps": (1,)})
    folder = work / "reference_with_rewards"
    folder.mkdir()
    prepare_reference(manifest, teacher, config)(folder)
    metrics = evaluate_teacher(teacher, folder, config)[0]
    assert {key for key in metrics if "text_image" in key and not key.endswith(("_low", "_high"))} == {
        f"{split}text_image/{row}" for split in ("", "unseen_") for row in ("1_steps", "real", "recon")
    }
    assert not [key for key in metrics if "image_quality" in key]

    bench = Bench.load(teacher, folder, config)
    guided = bench.denoiser().guided(bench.teacher.unconditional(1), config.guidance_scale)
    images = torch.cat(list(generate(bench.teacher, bench.cond["test"], trailing_timesteps(1), seed=0, batch_size=10, denoiser=guided)))
    with torch.inference_mode():
        wanted = load_reward(reward, to_train_on=False).score(images, bench.splits["test"].prompts).mean()
    assert metrics["text_image/1_steps"] == pytest.approx(float(wanted), rel=1e-4)  # each image with its own prompt

    with pytest.raises(UserError, match="other rewards; run prepare_reference again"):
        read_reference(folder, reference_key(config.model_copy(update={"rewards": (reward, ShippedQualityConfig())}), bench.teacher))
    with pytest.raises(ValidationError, match="rewards has text_image twice"):
        EvaluationConfig(samples=4, unseen_samples=4, rewards=(reward, reward))
    lost = EvaluationConfig(samples=4, unseen_samples=4, rewards=(TextImageConfig(weights=work / "none.safetensors"),))
    with pytest.raises(UserError, match=r"^evaluation\.rewards: .*none\.safetensors"):
        lost.check_judges()


def test_data_without_test_split_is_refused(manifest: Manifest, teacher: TeacherConfig) -> None:
    with pytest.raises(UserError, match="the split 'test' has 0 good rows"):
        prepare_reference(Manifest(manifest.root, {"train": manifest.splits["test"]}), teacher, CONFIG)


def test_teacher_and_stages_reach_the_table_and_the_grid(work: Path, reference: Path, teacher: TeacherConfig) -> None:
    teacher_metrics, grid, write = evaluate_teacher(teacher, reference, CONFIG)
    teacher_samples, stage_samples = work / "teacher_samples", work / "samples_k4"
    for folder in (teacher_samples, stage_samples):
        folder.mkdir()
    write(teacher_samples)
    assert sorted(p.relative_to(teacher_samples).as_posix() for p in teacher_samples.rglob("*.png")) == [
        f"{n}_steps/0{i}.png" for n in (1, 3) for i in range(3)
    ]
    rows = {key.split("/")[1].removesuffix("_low").removesuffix("_high") for key in teacher_metrics if "/" in key}
    assert rows == {"1_steps", "3_steps", "real", "recon"}
    assert teacher_metrics["samples"] == 10 and teacher_metrics["unseen_samples"] == 6
    split = read_reference(reference)["test"]
    assert teacher_metrics["fd_efficientnet_lite0_real/recon"] == pytest.approx(frechet_distance(split.recon.features, split.real.features))
    assert {k for k in teacher_metrics if k.startswith("unseen_clip_score") and not k.endswith(("_low", "_high"))} == {
        "unseen_clip_score/3_steps", "unseen_clip_score/recon", "unseen_clip_score/real",
    }  # fmt: skip

    assert {k: v for k, v in teacher_metrics.items() if k.endswith("teacher_distance/3_steps")} == pytest.approx(
        {"teacher_distance/3_steps": 0, "unseen_teacher_distance/3_steps": 0}, abs=1e-6
    )  # they are the reference

    metrics, _, write = evaluate_lora(lora(teacher, 0.0), teacher, reference, CONFIG)
    write(stage_samples)
    assert {f"{n}_steps" for n in (1, 2, 4)} == {
        p.name for p in stage_samples.iterdir() if p.is_dir()
    }  # the contract's four steps are added to the configured ones
    scores = read_scores(stage_samples)
    assert scores.prompts == split.prompts and scores.identity == read_scores(teacher_samples).identity
    assert {f"{name}/{n}_steps" for n, rows in scores.values.items() for name in rows} == {
        name for name in metrics if "/" in name and not name.startswith(("unseen_", "diversity")) and not name.endswith(("_low", "_high"))
    }  # diversity is that of a few prompts
    for n, rows in scores.values.items():
        for name, values in rows.items():
            assert float(values.mean()) == pytest.approx(metrics[f"{name}/{n}_steps"], rel=1e-9)
    for name in ("fd_efficientnet_lite0_real", "fd_efficientnet_lite0_recon", "clip_score", "image_quality"):
        low, value, high = (metrics[f"{name}/4_steps{end}"] for end in ("_low", "", "_high"))
        assert low <= value <= high
    assert "unseen_clip_score/4_steps" in metrics and "unseen_clip_score/2_steps" not in metrics

    report = {"train_seconds": 12.3456}
    table, frame, headline, short, main_grid = summarise_models(
        reference, teacher_metrics, teacher_samples, CONFIG, metrics_k4=metrics, samples_k4=stage_samples, report_k4=report
    )
    distance, best = metrics["fd_efficientnet_lite0_recon/4_steps"], teacher_metrics["fd_efficientnet_lite0_recon/3_steps"]
    assert short["k4_4"] == {
        "fd": pytest.approx(distance, rel=1e-3),
        "ratio": pytest.approx(distance / best, rel=1e-3),
        "clip": pytest.approx(metrics["clip_score/4_steps"], rel=1e-3),
        "quality": pytest.approx(metrics["image_quality/4_steps"], rel=1e-3),
        "diversity": pytest.approx(metrics["diversity/4_steps"], rel=1e-3),
        "seconds": 12.35,
    }
    assert short["teacher_3"]["ratio"] == 1 and "seconds" not in short["teacher_3"] and set(short) == {"teacher_3", "k4_4"}
    head, crops = table.split("### Details")[0], table.split("### Details")[1].split("## ")[0]
    assert "distance to the teacher's samples|" in head and "|diversity|" in head and "on crops" not in head
    assert "on crops to real" in crops and "|k4|4|" in crops
    assert "|k4|4|" in table and "|real images|-|" in table and "held out" in table
    line = frame[(frame.model == "k4") & (frame.row == "2_steps") & (frame.metric == "clip_score") & (frame.split == "test")]
    assert line.value.item() == metrics["clip_score/2_steps"] and line.samples.item() == 10
    assert set(headline) == {"teacher_3_steps", "k4_4_steps"}
    assert headline["k4_4_steps"]["image_quality"] == metrics["image_quality/4_steps"]
    assert main_grid.height == grid.height and main_grid.width > 190 + 2 * 128


def test_few_metrics_tell_runs_apart_and_have_a_direction() -> None:
    rows = {f"{name}/{n}_steps": float(n) for name in ("unseen_fd_x_recon", "fd_x_real", "fd_x_recon", "clip_score") for n in (1, 4, 25)}
    assert at_a_glance("k4", rows) == {"lower is better/k4 4 steps fd_x_recon": 4.0}
    assert at_a_glance("teacher", rows) == {"lower is better/teacher 25 steps fd_x_recon": 25.0}
    assert at_a_glance("unified", rows) == {
        "lower is better/unified 1 step fd_x_recon": 1.0,
        "lower is better/unified 4 steps fd_x_recon": 4.0,
        "higher is better/unified 4 steps clip_score": 4.0,
    }
    assert at_a_glance("lcm", rows) == {} == at_a_glance("k4", {})
    most = [
        at_a_glance(model, {f"{name}/{n}_steps": 1.0 for name in ("fd_x_recon", "clip_score") for n in (1, 2, 4, 8)})
        for model in (*MODELS, "teacher")
    ]
    assert sum(map(len, most)) + 2 <= 12  # with time and memory


def test_empty_lora_is_the_teacher_without_guidance(reference: Path, teacher: TeacherConfig) -> None:
    metrics, _, _ = evaluate_lora(lora(teacher, 0.0, steps=2), teacher, reference, CONFIG)
    plain, _ = Bench.load(teacher, reference, CONFIG).row("test", 2, Contract(2))
    moved, _, _ = evaluate_lora(lora(teacher, 1.0, steps=2), teacher, reference, CONFIG)
    key = "fd_efficientnet_lite0_real/2_steps"
    assert metrics[key] == pytest.approx(plain[key], rel=1e-4)
    assert abs(moved[key] - plain[key]) > 1e-3 * plain[key]


def test_crops_diversity_and_distance_to_the_teacher_by_hand(reference: Path, teacher: TeacherConfig) -> None:
    bench, contract, features = Bench.load(teacher, reference, CONFIG), Contract(2, eta=0.5), EfficientNetLite0(64)
    metrics, shown = bench.row("test", 2, contract)
    cond, denoiser = bench.cond["test"], bench.teacher.denoiser()
    options: dict[str, Any] = {"seed": 0, "denoiser": denoiser, "eta": 0.5}

    def sampled(n: int, variant: int = 0) -> torch.Tensor:
        return torch.cat([sample(bench.teacher, cond, b, contract.timesteps(2, 1000), variant=variant, **options) for b in batches(n, 4)])

    with torch.inference_mode():
        images, guided = sampled(10), denoiser.guided(bench.teacher.unconditional(1), CONFIG.guidance_scale)
        teachers = torch.cat(list(generate(bench.teacher, cond, trailing_timesteps(3), seed=0, batch_size=4, denoiser=guided)))
        middle, real = features(images[..., 16:48, 16:48]), bench.splits["test"].real
        several = torch.stack([features(images[:5]), features(sampled(5, 1)), features(sampled(5, 2))], dim=1)
        apart = [1 - torch.cosine_similarity(several[:, i], several[:, j]) for i, j in ((0, 1), (0, 2), (1, 2))]
        distance = 1 - torch.cosine_similarity(features(images), features(teachers))
    assert metrics["fd_efficientnet_lite0_crop_real/2_steps"] == pytest.approx(frechet_distance(middle, real.crops), rel=1e-4)
    assert metrics["diversity/2_steps"] == pytest.approx(float(torch.stack(apart).mean()), rel=1e-4)
    assert metrics["teacher_distance/2_steps"] == pytest.approx(float(distance.mean()), rel=1e-4) and distance.mean() > 1e-3
    assert len(shown) == 3 and "unseen_diversity/2_steps" not in metrics


def test_several_processes_find_what_one_finds_bit_for_bit(
    work: Path, reference: Path, manifest: Manifest, teacher: TeacherConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the processes that are started, as in those that are forked
    student = lora(teacher, 1.0, steps=1)
    config = CONFIG.model_copy(update={"samples": 6, "unseen_samples": 4, "batch_size": 2, "student_steps": (1,), "teacher_steps": (1,)})

    def evaluated(place: Path | None = None) -> dict[str, Any]:
        folder = Path(tempfile.mkdtemp(dir=work))
        prepare_reference(manifest, teacher, config)(folder)
        where = None if place is None else Place(place, ComputeConfig(processes=2))
        metrics, grid, write = evaluate_lora(student, teacher, folder, config, where)
        write(folder)
        files = {str(path.relative_to(folder)): file_sha256(path) for path in sorted(folder.rglob("*.*"))}
        return {"metrics": metrics, "grid": grid.tobytes().hex(), "files": files}

    (alone,) = on_ranks(1, work / "one", evaluated)
    assert len(alone["files"]) == 3 + 4 and len(alone["metrics"]) > 40
    assert on_ranks(2, work / "two", evaluated) == [alone, alone]
    assert on_ranks(4, work / "four", evaluated) == [alone] * 4  # of which one has no batch
    place = work / "evaluation.checkpoints"
    (started,) = on_ranks(1, work / "agent", lambda: evaluated(place))
    assert started == alone and list(place.iterdir()) == []
    with pytest.raises(UserError, match="other seed; run prepare_reference again"):  # as in this process
        evaluate_lora(student, teacher, reference, CONFIG.model_copy(update={"seed": 5}), Place(place, ComputeConfig(processes=2)))


def test_contract_is_required(teacher: TeacherConfig) -> None:
    with pytest.raises(UserError, match="sampling_contract"):
        Contract.of(LoRA({}, {}))
    with pytest.raises(UserError, match=r"guidance_scale 3\.0"):
        Contract.of(lora(teacher, 0.0, guidance_scale=3.0))


def test_both_grids_over_eta_and_one_step_once(reference: Path, teacher: TeacherConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    row = Bench.row
    monkeypatch.setattr(Bench, "row", lambda bench, split, n, *rest: drawn.append((n, *rest)) or row(bench, split, n, *rest))
    sampling = SamplingWaysConfig(grids=("tcd", "trailing"), etas=(0.0, 0.5), steps=(1, 2, 4))
    frame, table = measure_sampling(lora(teacher, 1.0), teacher, reference, CONFIG, sampling)
    assert len(frame) == 12 and table.count("\n") == 14
    assert [n for n, *_ in drawn] == [1, 2, 2, 4, 4, 4, 4]  # one step is one way, and two steps have the same grid twice
    distance = frame.set_index(["steps", "grid", "eta"])["fd_efficientnet_lite0_recon"]
    assert distance[1].nunique() == 1 and distance[2].nunique() == 2 and distance[4].nunique() == 4


def test_wiring_is_complete() -> None:
    pipeline = create_pipeline()
    models = ("k8", "k4", "k2", "k1", "unified", "unet")
    stages = {f"{kind}_{model}" for kind in ("metrics", "report", "samples") for model in models}
    stages |= {"metrics_feedback", "report_feedback"}
    parameters = {f"params:{name}" for name in ("teacher", "evaluation", "compute")}
    assert pipeline.inputs() == {"manifest", "evaluation.checkpoints", *parameters, *stages}
    assert pipeline.outputs() == {"teacher_grid", "results_table", "results_lines", "results", "results_by_model", "results_grid"}


def test_a_run_ends_with_three_numbers():
    def row(distance):
        return {"fd_x_real": 9.0, "fd_x_recon": distance, "clip_score": 1.0}

    picked = {"teacher_25_steps": row(1106.4), "teacher_4_steps": row(1247.0), "k8_8_steps": row(980.7)}
    assert last_words(picked) == "Distance to reconstructions, lower is better: teacher at 25 steps 1106, k8 at 8 steps 981."
    picked |= {f"unified_{n}_steps": row(1000.0 + n) for n in (1, 2, 4, 8)}
    expected = "teacher at 25 steps 1106, unified at 4 steps 1004, unified at 1 step 1001."
    assert last_words(picked) == f"Distance to reconstructions, lower is better: {expected}"
    assert last_words({"teacher_25_steps": row(1.0)}) is None and last_words({}) is None
