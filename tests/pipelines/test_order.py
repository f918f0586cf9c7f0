"""The order in which `kedro run` runs the chain."""

import os
import random

import pytest
from kedro.io import DataCatalog, MemoryDataset
from kedro.pipeline import Node, Pipeline
from kedro.runner import SequentialRunner

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.hooks import LockHook, OrderHook
from hypersd_pipeline.order import by_stage
from hypersd_pipeline.pipelines import full_distill


@pytest.mark.parametrize("stage", ["tscd_k8", "tscd_k4", "tscd_k2", "tscd_k1", "feedback", "dmd", "one_step_unet"])
def test_a_stage_is_trained_and_evaluated_before_another_one_begins(stage):
    order = [node.namespace for node in by_stage(full_distill.create_pipeline())]
    first = order.index(stage)
    assert order[first : first + order.count(stage)] == [stage] * order.count(stage)


def test_no_node_comes_before_its_inputs():
    pipeline = full_distill.create_pipeline()
    order = by_stage(pipeline)
    assert {node.name for node in order} == {node.name for node in pipeline.nodes} and len(order) == len(pipeline.nodes)
    assert all(order.index(before) < order.index(node) for node, needed in pipeline.node_dependencies.items() for before in needed)


def test_a_runner_runs_in_this_order_however_the_nodes_are_given():
    ran = []

    def add(name):
        return lambda x: ran.append(name) or name

    nodes = [
        Node(add("a.train"), "x", "a", name="train", namespace="a"),
        Node(add("a.evaluate"), "a", "ma", name="evaluate", namespace="a"),
        Node(add("b.train"), "a", "b", name="train", namespace="b"),
        Node(add("b.evaluate"), "b", "mb", name="evaluate", namespace="b"),
        Node(add("c.train"), "a", "c", name="train", namespace="c"),
    ]
    for seed in range(3):
        ran.clear()
        random.Random(seed).shuffle(nodes)
        pipeline = Pipeline(nodes)
        OrderHook().before_pipeline_run(pipeline)
        SequentialRunner().run(pipeline, DataCatalog({"x": MemoryDataset(0)}))
        assert ran == ["a.train", "a.evaluate", "b.train", "b.evaluate", "c.train"]


def locked(folder):
    hook = LockHook()
    hook._folder = folder
    return hook


def test_two_runs_never_write_the_same_thing_at_once(tmp_path):
    stage, other = Node(min, ["a", "b"], "c", name="train", namespace="tscd_k8"), Node(max, ["a", "b"], "d", name="generate")
    first, second = locked(tmp_path / "locks"), locked(tmp_path / "locks")
    first.before_node_run(stage)
    second.before_node_run(other)
    with pytest.raises(UserError, match=rf"^tscd_k8\.train: process {os.getpid()} on .* is at it .*, so wait until it ends or stop it\.$"):
        second.before_node_run(stage)
    first.after_pipeline_run()
    second.before_node_run(stage)
    second.on_pipeline_error()
    locked(tmp_path / "elsewhere").before_node_run(stage)
