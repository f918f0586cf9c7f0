"""Wiring of the export: two nodes for each model, tagged with its name."""

from __future__ import annotations

from typing import Any

from kedro.pipeline import Node, Pipeline

from hypersd_pipeline.recipes.export import export_lora, export_network, publish

LORAS = ("k8", "k4", "k2", "k1", "unified")


def create_pipeline(**_: Any) -> Pipeline:
    """``lora_*`` and ``one_step_unet`` with their evaluation -> ``export_*``, uploaded only where ``export.push_to_hub`` says so."""
    return sum((_of(model) for model in (*LORAS, "unet")), Pipeline([]))


def _of(model: str) -> Pipeline:
    told = {"teacher": "params:teacher", "export": "params:export", "metrics": f"metrics_{model}", "grid": f"grid_{model}"}
    write = (
        Node(export_network, {"network": "one_step_unet", **told}, f"export_{model}", name=f"export_{model}")
        if model == "unet"
        else Node(export_lora, {"lora": f"lora_{model}", **told}, f"export_{model}", name=f"export_{model}")
    )
    upload = Node(publish, [f"export_{model}", "params:export"], None, name=f"publish_{model}")
    return Pipeline([write, upload], tags=model)
