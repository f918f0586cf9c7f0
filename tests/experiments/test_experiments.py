"""Ablation and replicates: their cells, equal budgets, resuming, and the report."""

import json
from pathlib import Path

import pandas as pd
import pytest
import tiny
import torch
from worlds import write_images

from hypersd_pipeline.data.cache import LatentCache
from hypersd_pipeline.data.config import DataConfig
from hypersd_pipeline.data.rows import Manifest
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.evaluation.bench import prepare_reference
from hypersd_pipeline.experiments import chain
from hypersd_pipeline.experiments.cells import AblationConfig, ReplicatesConfig, plan, plan_replicates, step_forwards
from hypersd_pipeline.experiments.chain import Setting, feedback_lines, run_cells
from hypersd_pipeline.experiments.power import comparisons, deviation_of, differences, smallest_effect
from hypersd_pipeline.experiments.report import feedback_table, report, summarise_seeds
from hypersd_pipeline.io.records import RecordStore
from hypersd_pipeline.metrics.config import EvaluationConfig
from hypersd_pipeline.models.teacher import TeacherConfig
from hypersd_pipeline.recipes.feedback import AnnotatedData
from hypersd_pipeline.recipes.prepare import cache_latents, generate_dataset, validate_rows
from hypersd_pipeline.training.checkpoints import CheckpointStore
from hypersd_pipeline.training.config import FeedbackConfig, OneStepConfig, StageConfig, changed
from hypersd_pipeline.training.cost import prepared_forwards

JUDGES = Path(__file__).parents[2] / "src/hypersd_pipeline/assets/judges"
LOOP = {"steps": 1, "batch_size": 4, "learning_rate": 0.01}
LORA = {"rank": 2, "target_modules": ("to_q",)}


def stage(segments, weight=0.0, loop=LOOP, **more):
    terms = {"consistency": {"segments": segments, "guidance": (3.0, 5.0), **more}, "adversarial": {"weight": weight, "hidden": 32}}
    return StageConfig(terms=terms, lora=LORA, loop=loop)


TSCD = {"k8": stage(8), "k4": stage(4), "k2": stage(2, 0.5), "k1": stage(1, 1.0)}
ONE_STEP = OneStepConfig(
    sample={"timestep": 800},
    terms={
        "consistency": {"segments": 1, "guidance": (3.0, 5.0), "batch": 2},
        "matching": {"guidance": (3.0, 5.0)},
        "regression": {"pairs": {"count": 4, "steps": 2}},
    },
    lora=LORA,
    loop={**LOOP, "steps": 2},
)
GAN = {"weight": 1.0, "pair": False, "renoise": True, "hidden": 32}
DMD2 = changed(ONE_STEP, terms={"regression": None, "consistency": None, "adversarial": GAN})
BASELINES = {"TCD": {"tcd": stage(1, offset_noise=0.0, pure_noise=False)}, "DMD2": {"unified": DMD2}}


def ablation(**more):
    return AblationConfig(
        **{"pairs": 4, "shares": (0.2, 0.2, 0.2, 0.4), "tscd": TSCD, "one_step": ONE_STEP, "baselines": BASELINES, **more}
    )


def test_cells_are_the_issue_s_and_cost_the_same():
    config = ablation(budget=1400)
    cells = plan(config)
    names = [cell.name for cell in cells]
    assert len(names) == len(set(names)) == 15  # 8 chains, 4 single stages, the chain with its one step, two baselines
    for cell in cells:
        cost = sum(prepared_forwards(s, 4) + s.loop.steps * step_forwards(s, 4, config.encoder_share) for s in cell.stages.values())
        assert cost == pytest.approx(1400, rel=0.02), cell.name
    chosen = {cell.name: cell for cell in cells}
    plain = chosen["8-4-2-1 MSE, no offset noise, previous stage"].stages
    assert list(plain) == ["k8", "k4", "k2", "k1"]
    assert [s.consistency.teacher for s in plain.values()] == ["base", *["previous_stage"] * 3]
    assert {s.consistency.offset_noise for s in plain.values()} == {0.0} and {s.adversarial for s in plain.values()} == {None}
    hybrid = chosen["8-4-2-1 hybrid"].stages
    assert [s.terms["adversarial"].weight for s in hybrid.values()] == [0.0, 0.0, 0.5, 1.0]
    assert [s.sampling.eta for s in hybrid.values()] == [0.0, 0.0, 0.0, config.sampling_eta]
    assert {s.loop.seed for s in chosen["k=1 hybrid"].seeded(7).stages.values()} == {7}
    assert [c.name for c in plan(ablation(budget=99, only=("TCD",)))] == ["TCD"]
    (fewer,) = plan(ablation(pairs=2, budget=1400, only=("Hyper-SD",)))
    own, chosen_own = fewer.stages["unified"], chosen["Hyper-SD"].stages["unified"]
    assert own.pairs.count == 2 and chosen_own.pairs.count == 4 and own.loop.steps >= chosen_own.loop.steps


def test_all_cells_are_told_the_same_timestep_at_one_step():
    cells = plan(ablation(budget=1400, one_step_timestep=800))
    assert {list(c.stages.values())[-1].sampling.one_step_timestep for c in cells if "unified" not in c.stages} == {800}
    told = [list(c.stages.values())[-1] for c in cells if "unified" in c.stages]
    assert [(s.sampling.one_step_timestep, s.sample.timestep) for s in told] == [(None, 800)] * 2  # as it was trained


def test_budgets_are_in_images_where_batches_differ():
    """A batch of 8 in two passes of 4: each pass 2 + (3 + 2) + 5 * 2 / 4 forward passes on 4 images, and 4 pairs of 2 steps before."""
    larger = changed(ONE_STEP, loop={"batch_size": 8, "accumulate": 2})
    (cell,) = plan(ablation(budget=1000, only=("Hyper-SD",), one_step=larger, baselines={}))
    assert cell.batch == 4 and cell.stages["unified"].loop.steps == round((500 - 2) / (2 * 9.5))
    (tcd,) = plan(ablation(budget=1000, only=("TCD",)))
    (twice,) = plan(ablation(budget=1000, only=("TCD",), baselines={"TCD": {"tcd": stage(1, loop={**LOOP, "batch_size": 8})}}))
    assert (tcd.stages["tcd"].loop.steps, twice.stages["tcd"].loop.steps) == (200, 100)


def test_sections_of_conf_become_the_stages_that_they_describe():
    """Without a tag of their own: by what is in them."""
    sections = {
        "k8": TSCD["k8"].model_dump(),
        "unified": ONE_STEP.model_dump(),
        "unet": {"terms": {"mine": {"kind": "matching", "guidance": (3.0, 5.0)}}, "lora": LORA, "loop": LOOP},
        "pairs": {"terms": {"regression": {"pairs": {"count": 4}}}, "lora": LORA, "loop": LOOP},
        "gan": {"terms": [GAN | {"kind": "adversarial"}], "ema_on_cpu": True, "lora": LORA, "loop": LOOP},
        "feedback": FEEDBACK.model_dump(),
    }
    found = ReplicatesConfig(seeds=(0,), chain=sections).chain
    assert type(found["k8"]) is StageConfig and type(found["feedback"]) is FeedbackConfig
    assert {type(found[name]) for name in ("unified", "unet", "pairs", "gan")} == {OneStepConfig}
    assert found["unified"] == ONE_STEP and found["feedback"] == FEEDBACK


def test_refusals():
    with pytest.raises(UserError, match="previous_stage needs a stage before this one"):
        plan(ablation(budget=99, baselines={"TCD": {"tcd": stage(1, teacher="previous_stage")}}))
    with pytest.raises(UserError, match=r"ablation\.only: there is no cell 'TDC'; the cells are 8-4-2-1 hybrid"):
        plan(ablation(budget=99, only=("TDC",)))
    with pytest.raises(UserError, match=r"ablation\.budget: 3 forward passes do not pay for one step of '8-4-2-1 hybrid'"):
        plan(ablation(budget=3))
    with pytest.raises(ValueError, match="add up to 1"):
        ablation(budget=9, shares=(0.5, 0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A teacher, its cache and the evaluation's reference, all of the same 18 + 6 images."""
    folder = tmp_path_factory.mktemp("ablation")
    teacher = TeacherConfig(source=str(tiny.write_sd15(folder)))
    data = DataConfig(source={"kind": "folder", "root": str(write_images(folder / "images", 24))}, shard_rows=8, workers=1)
    generate_dataset(data)(folder / "dataset")
    manifest, _ = validate_rows(folder / "dataset", data)
    cache_latents(manifest, data, teacher)(folder / "latents")
    (folder / "reference").mkdir()
    prepare_reference(manifest, teacher, EVALUATION)(folder / "reference")
    nothing = Manifest.__new__(Manifest), None  # feedback without a perceptual model needs neither
    return AnnotatedData(*nothing, LatentCache(folder / "latents")), teacher, folder / "reference"


EVALUATION = EvaluationConfig(
    samples=6, unseen_samples=4, batch_size=6, student_steps=(1, 2), teacher_steps=(1, 3), bootstrap=100, grid_prompts=1
)


def setting(world, path):
    return Setting(*world, EVALUATION, CheckpointStore(path / "c"), RecordStore(path / "r"))


def run(world, path, config):
    return run_cells(plan(config), config.seeds, setting(world, path))[0]


def test_runs_resumes_and_reports(world, tmp_path, monkeypatch):
    config = ablation(budget=120, seeds=(0, 1), only=("8-4-2-1 hybrid", "TCD"))
    trained = []
    distil = chain.distil

    def watched(latents, teacher, stage, *rest):
        lora, metrics = distil(latents, teacher, stage, *rest)
        trained.append((stage.consistency.segments, stage.loop.seed))
        if len(trained) == 7:
            raise RuntimeError("the machine went away")
        return lora, metrics

    monkeypatch.setattr(chain, "distil", watched)
    with pytest.raises(RuntimeError, match="went away"):  # in the second seed, after its second stage
        run(world, tmp_path, config)
    assert trained == [(8, 0), (4, 0), (2, 0), (1, 0), (1, 0), (8, 1), (4, 1)]
    results = run(world, tmp_path, config)
    assert trained[7:] == [(8, 1), (4, 1), (2, 1), (1, 1), (1, 1)]
    again = run(world, tmp_path, config)
    assert len(trained) == 12
    pd.testing.assert_frame_equal(results, again)
    assert set(results.model) == {"teacher", "8-4-2-1 hybrid", "TCD"}
    curve = pd.read_csv(tmp_path / "r" / "8-4-2-1_hybrid_seed_0.csv")
    steps = sum(s.loop.steps for s in plan(config)[0].stages.values())
    assert curve.step.max() == steps and curve.step.is_monotonic_increasing
    table, plot = report(results)
    assert "|8-4-2-1 hybrid|2|" in table and "|TCD|2|" in table and "### CLIP score" in table
    assert plot.width > 500
    other = run(world, tmp_path, ablation(budget=150, seeds=(0,), only=("TCD",)))
    assert len(trained) == 13 and set(other.model) == {"teacher", "TCD"}  # another budget is another training


def test_a_tiny_lab(world, tmp_path):
    """Two cells with steps of their own, one with a discriminator. Its table has paired differences, and what seeds can show."""
    judge = {"weight": 0.3, "real": "data", "levels": 2, "norm": "none", "loss": "relativistic", "hidden": 32, "warmup_updates": 2}
    cells = {
        "squared error": {"k1": changed(stage(1), loop={"steps": 3})},
        "+ judge": {"k1": changed(stage(1), terms={"adversarial": judge})},
    }
    pair = {"+ judge": "squared error"}
    config = ablation(budget=1, seeds=(0, 1), cells=cells, compare=pair, only=tuple(cells))
    assert [[s.loop.steps for s in cell.stages.values()] for cell in plan(config)] == [[3], [1]]  # the budget is not theirs
    results = run(world, tmp_path, config)
    assert set(results.model) == {"teacher", *cells} and results[results.model == "+ judge"].seed.nunique() == 2
    pd.testing.assert_frame_equal(results, run(world, tmp_path, config))
    table = report(results, config.compare)[0].split("### Paired differences")[1]
    assert "|+ judge|squared error|fd_efficientnet_lite0_recon|2 steps|2|" in table and "|clip_score|1 step" in table
    with pytest.raises(UserError, match=r"ablation\.compare: there is no cell 'MSE'"):
        plan(ablation(budget=99, cells=cells, compare={"+ judge": "MSE"}))
    with pytest.raises(UserError, match=r"ablation\.cells: there is another cell 'TCD' already"):
        plan(ablation(budget=99, cells={"TCD": {"k1": stage(1)}}))


def test_one_step_cells_run(world, tmp_path):
    results = run(world, tmp_path, ablation(budget=150, seeds=(0,), only=("Hyper-SD", "DMD2")))
    assert set(results.model) == {"teacher", "Hyper-SD", "DMD2"}
    made = {path.name: [file.name for file in path.iterdir()] for path in (tmp_path / "r" / "pairs").iterdir()}
    assert made == {"Hyper_SD_seed_0_unified": ["pairs.safetensors"], "DMD2_seed_0_unified": []}


FEEDBACK = FeedbackConfig(
    sample={"steps": 2, "gradient_steps": 1},
    terms={"anchor": {}, "quality": {"kind": "reward", "reward": {"kind": "shipped_quality"}, "alpha": 2.0, "weight": 0.1}},
    held_out={"kind": "text_image", "weights": str(JUDGES / "held_out_reward.safetensors")},
    guard={"every": 2, "prompts": 2, "variants": 2},
    lora=LORA,
    loop={"steps": 2, "batch_size": 2, "learning_rate": 0.01},
    merge_weights=(1.0,),
    test_images=4,
)


def test_replicates_evaluate_each_stage_with_each_seed_and_resume(world, tmp_path):
    stages = {f"k{k}": changed(stage(k), loop={"steps": 2}) for k in (8, 4, 2, 1)}
    later = {"feedback": FEEDBACK, "unified": ONE_STEP, "unet": changed(ONE_STEP, terms={"consistency": None})}

    def once(seeds):
        config = ReplicatesConfig(seeds=seeds, chain={**stages, **later})
        return run_cells(plan_replicates(config), config.seeds, setting(world, tmp_path))

    first, _ = once((0,))
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "r").glob("*.json")}
    both, tradeoff = once((0, 1))
    assert len(made) == 8 and {path: path.stat().st_mtime_ns for path in made} == made
    assert list(dict.fromkeys(both.model)) == ["teacher", "k8", "k4", "k2", "k1", "feedback", "unified", "unet"]
    pd.testing.assert_frame_equal(first, both[both.seed == 0].reset_index(drop=True))
    for model in ("k1", "unified", "unet"):
        one, other = (both[(both.model == model) & (both.seed == s)].value for s in (0, 1))
        assert not (one.to_numpy() == other.to_numpy()).all()
    assert "|unified|2|" in report(both)[0]
    record = json.loads((tmp_path / "r" / "feedback_seed_0.json").read_text())["record"]
    assert {"w_1.00/held_out_reward", "before/trained_reward"} <= set(record)
    assert tradeoff[["seed", "weight"]].to_numpy().tolist() == [[0, 0.0], [0, 1.0], [1, 0.0], [1, 1.0]]
    assert tradeoff.held_out_reward[1] == record["w_1.00/held_out_reward"]
    assert "|held_out_reward|" in feedback_table(tradeoff) and "±" in feedback_table(tradeoff)


def test_intervals_by_hand():
    def line(model, seed, value):
        common = {"split": "test", "metric": "fd_x_recon", "samples": 9, "low": value - 1, "high": value + 2}
        return {"model": model, "seed": seed, "row": "4_steps", **common, "value": value}

    three = summarise_seeds(pd.DataFrame([line("a", i, v) for i, v in enumerate((10.0, 12.0, 14.0))] + [line("b", 0, 7.0)]))
    a, b = three.iloc[0], three.iloc[1]
    assert (a["mean"], a.seeds) == (12.0, 3) and a.high - a["mean"] == pytest.approx(4.303 * 2 / 3**0.5, rel=1e-3)
    assert (b["mean"], b.low, b.high) == (7.0, 6.0, 9.0)


def test_paired_differences_by_hand():
    """Seeds that both have. What a seed adds to both cancels out."""

    def line(model, seed, value, metric="fd_x_recon"):
        return {
            "model": model, "seed": seed, "row": "2_steps", "split": "test", "metric": metric, "samples": 9, "value": value,
            "low": value - 1, "high": value + 1,
        }  # fmt: skip

    ours = [line("Hyper-SD", s, 10.0 + 5 * s) for s in (0, 1, 2)]
    other = [line("TCD", s, 12.0 + 5 * s + d) for s, d in ((0, 0.0), (1, 1.0))] + [line("LCM", 0, 9.0)]
    more = [line(m, 0, 1.0, metric) for m in ("Hyper-SD", "TCD", "LCM") for metric in ("clip_score", "image_quality")]
    table, _ = report(pd.DataFrame(ours + other + more))
    half = 12.71 * (0.5**0.5) / 2**0.5
    assert f"|TCD|2|-2.5 ± {half:.2g}|" in table.split("### Hyper-SD minus each candidate")[1]
    assert "|LCM|" not in table.split("### Hyper-SD minus each candidate")[1]
    assert "minus each" not in report(pd.DataFrame([*ours[:1], *other[2:], *more]))[0]


def test_paired_differences_and_the_smallest_effect_by_hand():
    """Differences -3, -1, -2: deviation 1. Three seeds find (4.303 + 1.061) / sqrt(3) of it, five (2.776 + .941) / sqrt(5)."""

    def line(model, seed, value, row="1_steps"):
        return {"model": model, "seed": seed, "row": row, "split": "test", "metric": "fd_x_recon", "value": value}

    ours = [line("a", s, 10.0 + 5 * s + d) for s, d in enumerate((-3.0, -1.0, -2.0))]
    others = [line("b", s, 10.0 + 5 * s) for s in range(4)] + [line("b", 0, 1.0, "2_steps")]
    (found,) = differences(pd.DataFrame(ours + others), "a", "b").to_dict("records")
    assert (found["row"], found["seeds"], found["mean"], found["deviation"]) == ("1_steps", 3, -2.0, 1.0)
    assert found["half"] == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    assert deviation_of(found["half"], 3) == pytest.approx(1.0)
    assert smallest_effect(1.0, 3) == pytest.approx((4.303 + 1.061) / 3**0.5, rel=1e-3)
    assert smallest_effect(2.0, 5) == pytest.approx(2 * (2.776 + 0.941) / 5**0.5, rel=1e-3)
    table = comparisons(pd.DataFrame(ours + others), {"a": "b"})
    assert "|a|b|fd_x_recon|1 steps|3|-2 ± 2.5|3.1|1.7|0.99|" in table
    assert "|1|+0 ± ?|?|?|?|" in comparisons(pd.DataFrame([line("a", 0, 1.0), line("b", 0, 1.0)]), {"a": "b"})


def test_the_smallest_effect_is_found_four_times_in_five():
    """Against paired t tests on normal differences: 80 % of 4000 find the effect, within the approximation's few percent."""
    g = torch.Generator().manual_seed(0)
    for seeds, within in ((5, 0.03), (10, 0.02)):
        values = smallest_effect(1.0, seeds) + torch.randn(4000, seeds, generator=g)
        halves = {5: 2.776, 10: 2.262}[seeds] * values.std(dim=1) / seeds**0.5
        assert (values.mean(dim=1) > halves).float().mean().item() == pytest.approx(0.8, abs=within)


def test_the_trade_off_at_the_last_weight_joins_the_table():
    lines = [{"model": "SOLO", "seed": 0, "weight": w, "mask_ap": 0.3 + w / 10, "distance": 1000.0} for w in (0.0, 0.5, 1.0)]
    found = feedback_lines(pd.DataFrame(lines))
    assert found[["model", "seed", "row", "metric"]].to_numpy().tolist() == [
        ["SOLO", 0, "feedback", "mask_ap"], ["SOLO", 0, "feedback", "distance"]
    ]  # fmt: skip
    assert found.value.tolist() == [pytest.approx(0.4), 1000.0] and feedback_lines(pd.DataFrame([])).empty


def test_records_count_only_under_their_key(tmp_path):
    store = RecordStore(tmp_path)
    store.put("8-4-2-1 MSE, previous stage seed 0", "k", {"x": 1.5})
    assert store.get("8-4-2-1 MSE, previous stage seed 0", "k") == {"x": 1.5}
    assert store.get("8-4-2-1 MSE, previous stage seed 0", "other") is None and store.get("nobody", "k") is None
    next(tmp_path.glob("*.json")).write_text('{"key": "k", "rec')
    assert store.get("8-4-2-1 MSE, previous stage seed 0", "k") is None
