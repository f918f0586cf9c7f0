"""The anchor of feedback learning."""

import stages
import tiny
from stages import generator, sample_batch, sampled

from hypersd_pipeline.models.adapters import AdaptedBackbone
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher
from hypersd_pipeline.training.rollouts import SampleConfig, Samples
from hypersd_pipeline.training.stage import Stage
from hypersd_pipeline.training.terms.anchor import Anchor


def test_without_feedback_the_anchor_is_zero_and_it_grows(tmp_path):
    model = load_teacher(TeacherConfig(source=str(tiny.write_sd15(tmp_path))), parts=("backbone",))
    adapters = AdaptedBackbone(model.backbone, model.process, **stages.LORA, names=("feedback",), trainable=("feedback",))
    context = stages.context(adapters, stages.rows(), 2, "feedback")
    config = SampleConfig(steps=4, gradient_steps=2)
    rollout = Samples(config, context, unconditional=False, prompts=False, real=False, anchor=True)
    stage = sampled(Stage([(rollout, [(1.0, Anchor())])]), sample_batch())
    assert stage(generator())[0].item() == 0
    stages.moved(adapters, "feedback", seed=2)
    assert stage(generator())[0].item() > 0
