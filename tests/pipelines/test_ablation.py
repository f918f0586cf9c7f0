"""The ablation: its cells, equal budgets, resuming, and the report."""

import json

import pandas as pd
import pytest
import tiny
from test_layouts import write_pictures

from hypersd_pipeline.data.cache import LatentCache
from hypersd_pipeline.data.config import DataConfig
from hypersd_pipeline.data.rows import Manifest
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.io.records import RecordStore
from hypersd_pipeline.metrics.config import EvaluationConfig
from hypersd_pipeline.models.teacher import TeacherConfig
from hypersd_pipeline.pipelines.ablation import nodes
from hypersd_pipeline.pipelines.ablation.config import AblationConfig, plan, prepared_forwards, step_forwards
from hypersd_pipeline.pipelines.ablation.report import report, summarise
from hypersd_pipeline.pipelines.data_prep.nodes import cache_latents, generate_dataset, validate_rows
from hypersd_pipeline.pipelines.dmd.config import OneStepConfig
from hypersd_pipeline.pipelines.evaluation.nodes import prepare_reference
from hypersd_pipeline.pipelines.feedback.config import FeedbackConfig
from hypersd_pipeline.pipelines.replicates.nodes import ReplicatesConfig, feedback_table, run_replicates
from hypersd_pipeline.pipelines.tscd.config import StageOverrides, TscdDefaults
from hypersd_pipeline.training.checkpoints import CheckpointStore
from hypersd_pipeline.training.distillation import StageConfig, changed

LOOP = {"steps": 1, "batch_size": 4, "learning_rate": 0.01}


def stage(segments, weight=0.0, **more):
    return StageConfig(
        segments=segments,
        guidance=(3.0, 5.0),
        adversarial={"weight": weight, "hidden": 32},
        lora={"rank": 2, "target_modules": ("to_q",)},
        **{"loop": LOOP, **more},
    )


TSCD = {8: stage(8), 4: stage(4), 2: stage(2, 0.5), 1: stage(1, 1.0)}
BASELINES = {"TCD": (stage(1, offset_noise=0.0, pure_noise=False),)}
ONE_STEP = OneStepConfig(
    matching={"guidance": (3.0, 5.0), "regression_weight": 1.0, "consistency_weight": 1.0, "consistency_batch": 2, "time_input": 800},
    pairs={"count": 4, "steps": 2},
    lora={"rank": 2, "target_modules": ("to_q",)},
    loop={"steps": 2, "batch_size": 4, "learning_rate": 0.01},
)
DMD2 = changed(ONE_STEP, matching={"regression_weight": 0.0, "consistency_weight": 0.0}, adversarial={"weight": 1.0, "hidden": 32})


def planned(config):
    return plan(config, TSCD, BASELINES, ONE_STEP, {"DMD2": DMD2})


def test_cells_are_the_issue_s_and_cost_the_same():
    config = AblationConfig(pairs=4, budget=1400)
    cells = planned(config)
    names = [cell.name for cell in cells]
    assert len(names) == len(set(names)) == 15  # 8 chains, 4 single stages, the chain with its one step, two baselines
    for cell in cells:
        cost = sum(prepared_forwards(s, 4) + s.loop.steps * step_forwards(s, 4, config.encoder_share) for s in cell.stages)
        assert cost == pytest.approx(1400, rel=0.02), cell.name
    chosen = {cell.name: cell for cell in cells}
    plain = chosen["8-4-2-1 MSE, no offset noise, previous stage"].stages
    assert [s.teacher for s in plain] == ["base", *["previous_stage"] * 3]
    assert {s.offset_noise for s in plain} == {0.0} and {s.adversarial.weight for s in plain} == {0.0}
    assert [s.adversarial.weight for s in chosen["8-4-2-1 hybrid"].stages] == [0.0, 0.0, 0.5, 1.0]
    assert {s.loop.seed for s in chosen["k=1 hybrid"].seeded(7).stages} == {7}
    assert [c.name for c in planned(AblationConfig(budget=99, only=("TCD",)))] == ["TCD"]
    (fewer,) = planned(AblationConfig(pairs=2, budget=1400, only=("Hyper-SD",)))
    assert fewer.stages[-1].pairs.count == 2 and fewer.stages[-1].loop.steps >= chosen["Hyper-SD"].stages[-1].loop.steps


def test_budgets_are_in_images_where_batches_differ():
    """A batch of 8 in two passes of 4: each pass 2 + (3 + 2) + 5 * 2 / 4 forward passes on 4 images, and 4 pairs of 2 steps before."""
    larger = changed(ONE_STEP, loop={"batch_size": 8, "accumulate": 2})
    (cell,) = plan(AblationConfig(pairs=4, budget=1000, only=("Hyper-SD",)), TSCD, {}, larger, {})
    assert cell.batch == 4 and cell.stages[-1].loop.steps == round((500 - 2) / (2 * 9.5))
    (tcd,) = planned(AblationConfig(pairs=4, budget=1000, only=("TCD",)))
    (twice,) = plan(
        AblationConfig(pairs=4, budget=1000, only=("TCD",)), TSCD, {"TCD": (stage(1, loop=dict(LOOP, batch_size=8)),)}, ONE_STEP, {}
    )
    assert (tcd.stages[0].loop.steps, twice.stages[0].loop.steps) == (200, 100)


def test_refusals():
    with pytest.raises(UserError, match="previous_stage needs a stage before this one"):
        plan(AblationConfig(pairs=4, budget=99), TSCD, {"TCD": (stage(1, teacher="previous_stage"),)}, ONE_STEP, {})
    with pytest.raises(UserError, match=r"ablation\.only: there is no cell 'TDC'; the cells are 8-4-2-1 hybrid"):
        planned(AblationConfig(pairs=4, budget=99, only=("TDC",)))
    with pytest.raises(UserError, match=r"ablation\.budget: 3 forward passes do not pay for one step of '8-4-2-1 hybrid'"):
        planned(AblationConfig(pairs=4, budget=3))
    with pytest.raises(ValueError, match="add up to 1"):
        AblationConfig(pairs=4, budget=9, shares=(0.5, 0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A teacher, its cache and the evaluation's reference, all of the same 18 + 6 pictures."""
    folder = tmp_path_factory.mktemp("ablation")
    teacher = TeacherConfig(source=str(tiny.write_sd15(folder)))
    data = DataConfig(source={"kind": "folder", "root": str(write_pictures(folder / "pictures", 24))}, shard_rows=8, workers=1)
    generate_dataset(data)(folder / "dataset")
    manifest, _ = validate_rows(folder / "dataset", data)
    cache_latents(manifest, data, teacher)(folder / "latents")
    (folder / "reference").mkdir()
    prepare_reference(manifest, teacher, EVALUATION)(folder / "reference")
    return teacher, LatentCache(folder / "latents"), folder / "reference"


EVALUATION = EvaluationConfig(samples=6, batch_size=6, student_steps=(1, 2), teacher_steps=(1, 3), bootstrap=100, grid_prompts=1)


def run(world, path, config, cells=None):
    teacher, latents, reference = world
    cells = planned(config) if cells is None else cells
    return nodes.run_cells(cells, config, latents, teacher, reference, EVALUATION, CheckpointStore(path / "c"), RecordStore(path / "r"))


def test_runs_resumes_and_reports(world, tmp_path, monkeypatch):
    config = AblationConfig(pairs=4, budget=120, seeds=(0, 1), only=("8-4-2-1 hybrid", "TCD"))
    trained = []
    distil = nodes.distil

    def watched(latents, teacher, stage, checkpoints, *rest):
        lora, figures = distil(latents, teacher, stage, checkpoints, *rest)
        trained.append((stage.segments, stage.loop.seed))
        if len(trained) == 7:
            raise RuntimeError("the machine went away")
        return lora, figures

    monkeypatch.setattr(nodes, "distil", watched)
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
    steps = sum(s.loop.steps for s in planned(config)[0].stages)
    assert curve.step.max() == steps and curve.step.is_monotonic_increasing
    table, plot = report(results)
    assert "|8-4-2-1 hybrid|2|" in table and "|TCD|2|" in table and "### CLIP score" in table
    assert plot.width > 500
    other = run(world, tmp_path, AblationConfig(pairs=4, budget=150, seeds=(0,), only=("TCD",)))
    assert len(trained) == 13 and set(other.model) == {"teacher", "TCD"}  # another budget is another training


def test_one_step_cells_run(world, tmp_path):
    results = run(world, tmp_path, AblationConfig(pairs=4, budget=150, seeds=(0,), only=("Hyper-SD", "DMD2")))
    assert set(results.model) == {"teacher", "Hyper-SD", "DMD2"}
    assert (tmp_path / "r" / "pairs" / "Hyper_SD" / "pairs.safetensors").is_file() and not list(
        (tmp_path / "r" / "pairs" / "DMD2").iterdir()
    )


FEEDBACK = FeedbackConfig(
    judgement={"steps": 2, "gradient_steps": 1},
    rewards=[{"reward": {"kind": "shipped_quality"}, "alpha": 2.0, "weight": 0.1}],
    held_out={"kind": "shipped_quality"},
    guard={"every": 2, "prompts": 2, "variants": 2},
    lora={"rank": 2, "target_modules": ("to_q",)},
    loop={"steps": 2, "batch_size": 2, "learning_rate": 0.01},
    merge_weights=(1.0,),
)


def test_replicates_evaluate_each_stage_with_each_seed_and_resume(world, tmp_path):
    teacher, latents, reference = world
    defaults = TscdDefaults(
        guidance=(3.0, 5.0), lora={"rank": 2, "target_modules": ("to_q",)}, loop={"steps": 2, "batch_size": 4, "learning_rate": 0.01}
    )
    stages = [StageOverrides(segments=k) for k in (8, 4, 2, 1)]

    def once(seeds):
        places = CheckpointStore(tmp_path / "c"), RecordStore(tmp_path / "r")
        later = FEEDBACK, ONE_STEP, changed(ONE_STEP, matching={"consistency_weight": 0.0})
        data = Manifest.__new__(Manifest), None  # feedback without a perceptual model needs neither
        return run_replicates(
            ReplicatesConfig(seeds=seeds), defaults, *stages, *later, *data, latents, teacher, reference, EVALUATION, *places
        )

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

    three = summarise(pd.DataFrame([line("a", i, v) for i, v in enumerate((10.0, 12.0, 14.0))] + [line("b", 0, 7.0)]))
    a, b = three.iloc[0], three.iloc[1]
    assert (a["mean"], a.seeds) == (12.0, 3) and a.high - a["mean"] == pytest.approx(4.303 * 2 / 3**0.5)
    assert (b["mean"], b.low, b.high) == (7.0, 6.0, 9.0)


def test_paired_differences_by_hand():
    """Seeds that both have; what a seed adds to both cancels out."""

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


def test_records_count_only_under_their_key(tmp_path):
    store = RecordStore(tmp_path)
    store.put("8-4-2-1 MSE, previous stage seed 0", "k", {"x": 1.5})
    assert store.get("8-4-2-1 MSE, previous stage seed 0", "k") == {"x": 1.5}
    assert store.get("8-4-2-1 MSE, previous stage seed 0", "other") is None and store.get("nobody", "k") is None
    next(tmp_path.glob("*.json")).write_text('{"key": "k", "rec')
    assert store.get("8-4-2-1 MSE, previous stage seed 0", "k") is None
