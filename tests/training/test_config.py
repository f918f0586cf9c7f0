"""A stage's terms as they are written: names, kinds, order, what switches a term off, and each refusal's sentence."""

import itertools

import pytest
import stages
from pydantic import ValidationError

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.training.config import KINDS, FeedbackConfig, OneStepConfig, StageConfig, changed, merged
from hypersd_pipeline.training.stage import build_stage, needs

CONSISTENCY = {"segments": 2, "guidance": (3.0, 5.0)}
MATCHING = {"guidance": (3.0, 3.0)}
QUALITY = {"kind": "reward", "reward": {"kind": "shipped_quality"}, "alpha": 2.0}
PERCEPTUAL = {"model": {"kind": "solo"}}
GAN = {"weight": 0.5, "pair": False}
ALL = {
    "consistency": CONSISTENCY,
    "matching": MATCHING,
    "regression": {},
    "quality": QUALITY,
    "anchor": {},
    "perceptual": PERCEPTUAL,
    "adversarial": GAN,
}


def stage(terms, kind=StageConfig, **more):
    return kind(terms=terms, **{"lora": stages.LORA, "loop": stages.LOOP, **more})


def refusal(terms, kind=StageConfig, **more):
    with pytest.raises(ValidationError) as error:
        stage(terms, kind, **more)
    return str(error.value)


def test_terms_are_taken_in_one_order_whatever_the_configurations_is():
    assert KINDS == ("consistency", "matching", "regression", "reward", "anchor", "perceptual", "adversarial")
    for names in itertools.islice(itertools.permutations(ALL), 0, None, 97):
        config = stage({name: ALL[name] for name in names})
        assert list(config.active()) == list(ALL)
        assert config.identity() == stage(ALL).identity()


def test_terms_of_a_kind_keep_their_order():
    twice = {"b": QUALITY, "a": {**QUALITY, "alpha": 3.0}, "consistency": CONSISTENCY}
    assert list(stage(twice).active()) == ["consistency", "b", "a"]


def test_the_built_stage_has_that_order():
    networks = stages.Networks(stages.process(), base=None, student=None, ema=None)
    context = stages.context(networks, stages.rows(), pairs=stages.pairs())
    config = stage({"quality": QUALITY, "regression": {"weight": 0.3}, "anchor": {"weight": 0.0}, "consistency": CONSISTENCY})
    parts = [[(weight, type(term).__name__) for weight, term in terms] for _, terms in build_stage(config, context).parts]
    assert parts == [[(1.0, "Consistency")], [(0.3, "Regression"), (1.0, "RewardTerm")]]


def test_a_list_of_terms_equals_the_mapping():
    rest = {name: term for name, term in ALL.items() if name != "quality"}
    listed = [QUALITY, *({"kind": name, **term} for name, term in reversed(rest.items())), None]
    config = stage(listed)
    assert (
        config.active() == stage({**rest, "reward": QUALITY}).active()
        and config.identity() == stage({**rest, "reward": QUALITY}).identity()
    )
    assert list(stage([QUALITY, QUALITY, {"kind": "anchor"}, QUALITY]).active()) == ["reward", "reward_2", "reward_3", "anchor"]
    assert stage(list(config.active().values())).identity() == config.identity()  # terms that are made already


def test_null_and_weight_0_switch_a_term_off():
    plain = stage({"consistency": CONSISTENCY})
    for off in (None, {"weight": 0.0}):
        config = stage({"consistency": CONSISTENCY, "adversarial": off, "anchor": off, "perceptual": off and {**off, **PERCEPTUAL}})
        assert list(config.active()) == ["consistency"] and config.adversarial is None and not config.needs_images
        assert config.identity() == plain.identity() and needs(config) == needs(plain)
    assert needs(plain) == {"fresh_names": (), "encoder_names": (), "trainable": ()}


def test_what_a_stages_terms_need_on_the_network():
    one = stage({"consistency": CONSISTENCY, "adversarial": {"encoder": "adapter"}})
    assert needs(one) == {"fresh_names": (), "encoder_names": ("discriminator",), "trainable": ("discriminator",)}
    assert needs(stage({"matching": MATCHING})) == {"fresh_names": ("critic",), "encoder_names": (), "trainable": ("critic",)}
    assert stage({"quality": QUALITY}).needs_images and not stage({"matching": MATCHING}).needs_images


@pytest.mark.parametrize(
    ("others", "place"),
    [
        ({"consistency": CONSISTENCY}, "trajectory"),
        ({"consistency": CONSISTENCY, "perceptual": PERCEPTUAL}, "trajectory"),
        ({"consistency": CONSISTENCY, "regression": {}}, "sample"),
        ({"consistency": CONSISTENCY, "regression": {"weight": 0.0}}, "trajectory"),
        ({"perceptual": PERCEPTUAL}, "sample"),
        ({}, "sample"),
    ],
)
def test_what_the_adversarial_term_judges(others, place):
    config = stage({**others, "adversarial": GAN})
    assert config.place_of(config.adversarial) == place


CHOOSE = "choose one of consistency, matching, regression, reward, anchor, perceptual, adversarial"
NOTHING = "terms: all that could train the student have weight 0 or are missing; set one of them"


@pytest.mark.parametrize(
    ("terms", "sentence"),
    [
        (
            {"consistency": {**CONSISTENCY, "kind": "nonsense"}},
            "Input tag 'nonsense' found using 'kind' does not match any of the expected",
        ),
        (
            [{"kind": "nonsense"}],
            "Input tag 'nonsense' found using 'kind' does not match any of the expected tags: 'consistency', 'matching'",
        ),
        ({"quality": {"alpha": 2.0}}, f"terms.quality needs a kind; {CHOOSE}"),
        ([{"alpha": 2.0}], f"needs a kind; {CHOOSE}"),
        (["consistency"], "terms: a list holds sections with a kind, not 'consistency'"),
        (5, "terms is no list of terms but 5"),
        ({"consistency": {**CONSISTENCY, "segmentz": 2}}, "terms.consistency.consistency.segmentz"),
        ({"consistency": {**CONSISTENCY, "weight": -1.0}}, "terms.consistency.consistency.weight"),
        ({}, NOTHING),
        ([], NOTHING),
        ({"anchor": {}}, NOTHING),
        ({"consistency": None, "adversarial": None}, NOTHING),
        ({"consistency": {**CONSISTENCY, "weight": 0.0}, "adversarial": {"weight": 0.0}}, NOTHING),
        ({"matching": {**MATCHING, "weight": 0.0}, "regression": {"weight": 0.0}, "anchor": {}}, NOTHING),
        ({"matching": MATCHING, "adversarial": {}}, "terms.adversarial.pair: a sample has no second point to be judged with; use false"),
        (
            {"matching": MATCHING, "adversarial": {**GAN, "encoder": "adapter"}},
            "terms.adversarial.encoder: samples are judged by the frozen encoder only; use frozen",
        ),
        ({"consistency": CONSISTENCY, "adversarial": {"hidden": 48}}, "hidden is 48, not a multiple of 32"),
    ],
)
def test_what_is_refused(terms, sentence):
    assert sentence in refusal(terms)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "reward"])
def test_a_kind_stands_there_once_but_for_rewards(kind):
    twice = {"quality": QUALITY, "one": {"kind": kind, **ALL[kind]}, "other": {"kind": kind, **ALL[kind]}}
    sentence = f"terms: {kind} stands there twice; a stage has one of it"
    assert sentence in refusal(twice) and sentence in refusal(list(twice.values()))
    assert set(stage({**twice, "other": {**twice["other"], "weight": 0.0}}).active()) == {"quality", "one"}


def test_a_timestep_is_for_one_step_and_of_the_schedule():
    sentence = "timestep is for one step only, and steps is 4"
    assert sentence in refusal({"regression": {}}, sample={"steps": 4, "timestep": 800})
    stage({"regression": {}}, sample={"timestep": 999}).check(stages.process())
    with pytest.raises(UserError, match=r"stage.sample.timestep is 1000, but the teacher's timesteps end at 999; lower it"):
        stage({"regression": {}}, sample={"timestep": 1000}).check(stages.process())


def test_feedback_needs_a_reward_and_names_its_merges():
    sentence = "terms: feedback needs at least one reward with a weight above 0"
    for quality in (None, {**QUALITY, "weight": 0.0}):
        assert sentence in refusal({"quality": quality, "perceptual": PERCEPTUAL}, FeedbackConfig, **stages.FEEDBACK)
    for weights, sentence in (((0.0, 1.0), "greater than 0"), ((0.501, 0.502), "differ in their first two decimals")):
        assert sentence in refusal({"quality": QUALITY}, FeedbackConfig, **stages.FEEDBACK, merge_weights=weights)
    off = stage({"quality": QUALITY, "perceptual": {**PERCEPTUAL, "weight": 0.0}}, FeedbackConfig, **stages.FEEDBACK)
    assert off.perceptual is None and off.segmenter is not None and [term.alpha for term in off.rewards] == [2.0]


def test_memory_logging_and_sampling_are_no_part_of_a_stages_identity():
    config = stage({"matching": MATCHING}, OneStepConfig)
    free = changed(
        config, gradient_checkpointing=True, decode_checkpointing=True, sampling={"eta": 1.0}, loop={"log_every": 7}, ema_on_cpu=True
    )  # fmt: skip
    assert free.identity() == config.identity()
    for more in ({"loop": {"steps": 7}}, {"sample": {"timestep": 800}}, {"ema_decay": 0.9}, {"terms": {"matching": {"weight": 2.0}}}):
        assert changed(config, **more).identity() != config.identity(), more


def test_changed_values_are_merged_key_by_key_at_every_depth():
    config = stage({"consistency": CONSISTENCY, "matching": MATCHING})
    other = changed(config, terms={"matching": {"critic": {"updates": 7}}, "consistency": None})
    assert other.terms["matching"].critic.updates == 7 and other.terms["matching"].guidance == (3.0, 3.0) and other.consistency is None
    assert merged({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 4}, "e": 5}) == {"a": {"b": 4, "c": 2}, "d": 3, "e": 5}


@pytest.mark.parametrize(
    ("terms", "names", "sentence"),
    [
        ({"regression": {}}, ("base", "student"), "stage.terms.regression does not fit this training"),
        ({"perceptual": PERCEPTUAL}, ("base", "student"), "stage.terms.perceptual does not fit"),
        ({"matching": MATCHING}, ("base", "student", "ema"), "stage.terms.matching does not fit"),
        ({"consistency": CONSISTENCY}, ("base", "student"), "stage.terms.consistency does not fit"),
        ({"consistency": {**CONSISTENCY, "teacher": "previous_stage"}}, ("base", "student", "ema"), "stage.terms.consistency does not fit"),
        (
            {"consistency": CONSISTENCY, "adversarial": {"encoder": "adapter"}},
            ("base", "student", "ema"),
            "stage.terms.adversarial.encoder: adapter does not fit",
        ),
    ],
)
def test_a_term_that_needs_what_a_training_lacks_is_refused(terms, names, sentence):
    """Without this the stage would end in an assertion once the networks are loaded."""
    networks = stages.Networks(stages.process(), **dict.fromkeys(names))
    with pytest.raises(UserError, match=sentence):
        build_stage(stage(terms), stages.context(networks, stages.rows()))


def test_a_compiled_stage_has_no_gradient_checkpointing():
    values = {"terms": {"consistency": {"segments": 4, "guidance": (3.0, 3.0)}}, "lora": stages.LORA, "gradient_checkpointing": True}
    with pytest.raises(ValueError, match=r"loop\.compile does not go with gradient_checkpointing"):
        StageConfig(**values, loop={**stages.LOOP, "compile": True})
    assert StageConfig(**values, loop=stages.LOOP).identity() == StageConfig(**values, loop={**stages.LOOP, "prefetch": True}).identity()
