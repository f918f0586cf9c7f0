"""The order in which Kedro runs the chain."""

import pytest
from kedro.pipeline import Node, Pipeline

from hypersd_pipeline.pipelines import full_distill
from hypersd_pipeline.pipelines.nodes import EvaluationNode


@pytest.mark.parametrize("name", ["k8", "k4", "k2", "k1"])
def test_a_stage_is_evaluated_before_the_next_one_trains(name):
    order = [node.name for node in full_distill.create_pipeline().nodes]
    trained = order.index(f"tscd_{name}.train")
    assert order[trained + 1] == f"tscd_{name}.evaluate"


def test_evaluation_goes_first_among_the_nodes_that_are_ready():
    def same(x):
        return x

    nodes = [Node(same, "x", "a", name="a"), EvaluationNode(same, "x", "z", name="z"), EvaluationNode(same, "x", "y", name="y")]
    for made in (Pipeline(nodes), Pipeline(list(reversed(nodes)))):
        assert [node.name for node in made.nodes] == ["y", "z", "a"]
    assert [node.name for node in Pipeline(nodes, namespace="n", inputs="x").nodes] == ["n.y", "n.z", "n.a"]
