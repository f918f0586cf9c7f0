"""What a step costs, by hand."""

import pytest
import stages

from hypersd_pipeline.training.config import FeedbackConfig, OneStepConfig, StageConfig, changed
from hypersd_pipeline.training.cost import ideal_forwards, prepared_forwards, with_cost

SHARE = 0.35
TSCD = StageConfig(
    terms={"consistency": {"segments": 2, "guidance": (3.0, 5.0)}, "adversarial": {"weight": 0.0, "hidden": 32}},
    lora=stages.LORA,
    loop=stages.LOOP,
)
GAN = {"pair": False, "renoise": True, "hidden": 32}
JUDGED = {"weight": 0.5}
PREVIOUS = {"teacher": "previous_stage"}


@pytest.mark.parametrize(
    ("consistency", "judge", "others", "expected"),
    [
        ({}, {}, {}, 5.0),
        (PREVIOUS, {}, {}, 4.0),
        ({}, {}, {"gradient_checkpointing": True}, 6.0),
        ({"segments": 8, "starts": "segment_ends", "ends": "segment_start", "target": "solver"}, {}, {}, 12.0),  # five guided steps
        ({"segments": 4, "solver_points": 8, **PREVIOUS, "target": "solver"}, {}, {}, 4.0),  # two steps, student twice
        (PREVIOUS, {**JUDGED, "encoder": "adapter"}, {}, 4 + 7 * SHARE),  # three points there and back, once more back
        (PREVIOUS, {**JUDGED, "encoder": "frozen"}, {}, 4 + 4 * SHARE),
        ({}, {**JUDGED, "encoder": "frozen"}, {"gradient_checkpointing": True}, 6 + 4 * SHARE),
        ({}, {**JUDGED, "pair": False}, {}, 5 + 3 * SHARE),
        ({"batch": 2}, {**JUDGED, "pair": False}, {}, (5 + 3 * SHARE) * 2 / 4),  # the judge sees as many samples as there are
        ({}, {**JUDGED, "encoder": "adapter"}, {"gradient_checkpointing": True}, 6 + 11 * SHARE),  # 3 there, 4 back, 4 again
    ],
)
def test_a_distillation_stage(consistency, judge, others, expected):
    config = changed(TSCD, terms={"consistency": consistency, "adversarial": judge}, **others)
    assert ideal_forwards(config, SHARE) == pytest.approx(expected)


def one_step(batch=32, accumulate=1, **terms):
    loop = {**stages.LOOP, "batch_size": batch * accumulate, "accumulate": accumulate}
    return OneStepConfig(terms=terms, lora=stages.LORA, loop=loop)


def matching(**changes):
    return {"guidance": (3.0, 3.0), **changes}


KEPT = {"segments": 1, "guidance": (3.0, 5.0), "batch": 16}
FIVE = {"updates": 5}


@pytest.mark.parametrize(
    ("terms", "passes", "full", "expected"),
    [
        ({"matching": matching()}, 1, False, 2 + 2 + 1 + 2 * 2),  # student, real score, fake score, critic
        ({"matching": matching(critic=FIVE)}, 1, False, 2 + 2 + 1 + 2 * 5),
        ({"matching": matching(), "adversarial": GAN}, 1, False, 9 + 3 * SHARE),
        ({"matching": matching()}, 1, True, 3 + 2 + 1 + 2 * 2),
        ({"matching": matching(), "consistency": KEPT}, 1, False, 9 + 5 * 16 / 32),
        ({"matching": matching(), "consistency": None}, 1, True, 10),  # a full UNet has no other steps to keep
        ({"matching": matching(weight=0.0), "regression": {}}, 1, False, 2),
        ({"regression": {}, "adversarial": GAN}, 1, True, 3 + 3 * SHARE),
        ({"matching": matching(critic=FIVE)}, 2, False, 2 + 2 + 1 + 2 * 2.5),
        ({"matching": matching(critic=FIVE)}, 16, False, 2 + 2 + 1 + 2),  # once a pass, for the mean gradient
        ({"matching": matching(batch=8)}, 1, False, 2 + 7 * 8 / 32),
        ({"matching": matching(batch=64)}, 1, False, 2 + 7),  # no more than there are
        ({"matching": matching(), "consistency": {**KEPT, "batch": None}, "regression": {}}, 1, False, 9 + 5),
    ],
)
def test_a_one_step_stage(terms, passes, full, expected):
    assert ideal_forwards(one_step(accumulate=passes, **terms), SHARE, full=full) == pytest.approx(expected)


def test_gradient_checkpointing_computes_each_backward_pass_again():
    config = one_step(matching=matching(), consistency=KEPT, adversarial=GAN)
    once_more = 1 + 2 + 16 / 32 + SHARE  # student, both updates of the critic, the consistency's student, the encoder
    saved = changed(config, gradient_checkpointing=True)
    assert ideal_forwards(saved, SHARE) - ideal_forwards(config, SHARE) == pytest.approx(once_more)


@pytest.mark.parametrize(
    ("steps", "gradient_steps", "expected"),
    [(1, 1, 2), (4, 1, 3 + 2), (4, 2, 2.5 + 2), (4, 4, 1.5 + 2), (2, 2, 0.5 + 2)],  # the mean walk, then there and back
)
def test_the_walk_before_the_step_with_gradient(steps, gradient_steps, expected):
    config = changed(one_step(regression={}), sample={"steps": steps, "gradient_steps": gradient_steps})
    assert ideal_forwards(config, SHARE) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "config", "full", "expected"),
    [
        ("tscd_k8", StageConfig, False, 5),
        ("tscd_k1", StageConfig, False, 5 + 3 * SHARE),  # x_t's features come with the teacher's step
        ("baseline_pcm", StageConfig, False, 5 + 3 * SHARE),
        ("baseline_progressive_k8", StageConfig, False, 12),
        ("baseline_progressive_k1", StageConfig, False, 4),
        ("dmd", OneStepConfig, False, 2 + 7 * 8 / 32 + 5 * 8 / 32),
        ("one_step_unet", OneStepConfig, True, 3),  # regression alone
        ("baseline_dmd", OneStepConfig, False, 2 + 7),
        ("baseline_dmd2", OneStepConfig, False, 2 + 3 + 10 + 3 * SHARE),
        ("feedback", FeedbackConfig, False, 2.5 + 2 + 1 + 2 * 4 / 16),  # walk, student, anchor, perceptual on 4 of 16
    ],
)
def test_the_stages_of_conf(name, config, full, expected):
    assert ideal_forwards(config(**stages.parameters()[name]["stage"]), SHARE, full=full) == pytest.approx(expected)


def test_pairs_are_paid_for_before_the_training():
    pairs = {"count": 160, "steps": 10, "source": "teacher"}
    assert prepared_forwards(one_step(regression={"pairs": pairs}), 32) == 160 / 32 * 10 * 2  # both halves of the guidance
    assert prepared_forwards(one_step(regression={"pairs": {**pairs, "source": "distilled"}}), 32) == 160 / 32 * 10
    assert prepared_forwards(one_step(regression={"weight": 0.0, "pairs": pairs}, matching=matching()), 32) == 0


def test_the_reports_cost_by_hand():
    config = changed(TSCD, loop={"accumulate": 4})
    report = {"mean_step_seconds": 3.0, "unet_forward_seconds": 0.1, "encoder_share": 0.4}  # of a pass: a quarter of an update
    costed = with_cost(report, config)
    assert costed["step_forwards"] == pytest.approx(7.5) and costed["step_over_ideal"] == pytest.approx(1.5)
    assert with_cost({"encoder_share": 0.4}, config) == {"encoder_share": 0.4}  # nothing was trained
    assert with_cost(report, one_step(matching=matching()), full=True)["ideal_forwards"] == pytest.approx(10)
