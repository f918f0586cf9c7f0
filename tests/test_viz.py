"""`kedro viz` draws the main job in layers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from servers import ROOT, environment_of

DRAW = """
import sys
from pathlib import Path
from kedro_viz.api.rest.responses.save_responses import save_api_main_response_to_fs
from kedro_viz.server import load_and_populate_data
import fsspec
load_and_populate_data(Path.cwd(), is_lite=True)
save_api_main_response_to_fs(sys.argv[1], fsspec.filesystem("file"))
"""


def test_the_main_job_is_drawn_in_layers_from_the_data_to_the_reports(tmp_path: Path):
    """What the page of Kedro-Viz gets. It leaves layers out where one would have to stand both before and after another."""
    saved = tmp_path / "main"
    done = subprocess.run([sys.executable, "-c", DRAW, str(saved)], cwd=ROOT, env=environment_of(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    graph = json.loads(saved.read_text())
    layers = {node["name"]: node["layer"] for node in graph["nodes"] if node["type"] == "data"}
    drawn = [layer for layer in graph["layers"] if layer in layers.values()]  # without those of other pipelines
    assert drawn == ["primary", "model input", "models", "reporting"]
    assert layers["latents"] == "model input" and layers["lora_k4"] == "models" and layers["results_grid"] == "reporting"
    assert layers["tscd_k4.checkpoints"] is None
