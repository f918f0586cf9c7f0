"""`kedro viz` draws the main job in layers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request

from servers import ROOT, environment_of, free_port


def test_the_main_job_is_drawn_in_layers_from_the_data_to_the_reports():
    """Kedro-Viz leaves layers out where one would have to stand both before and after another."""
    port = free_port()
    command = [sys.executable, "-m", "kedro", "viz", "run", "--no-browser", "--lite", "--port", str(port)]
    server = subprocess.Popen(
        command, cwd=ROOT, env=environment_of(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        graph = None
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/main", timeout=30) as answer:
                    graph = json.load(answer)
                break
            except OSError:
                assert server.poll() is None
                time.sleep(0.2)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    assert graph
    layers = {node["name"]: node["layer"] for node in graph["nodes"] if node["type"] == "data"}
    drawn = [layer for layer in graph["layers"] if layer in layers.values()]  # without those of other pipelines
    assert drawn == ["primary", "model input", "models", "reporting"]
    assert layers["latents"] == "model input" and layers["lora_k4"] == "models" and layers["results_grid"] == "reporting"
    assert layers["tscd_k4.checkpoints"] is None
