"""MLflow's own pages in a real browser: what its links open on."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

from browsers import browser
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from servers import Server

from hypersd_pipeline.io.mlflow_store import connect

ROOT = Path(__file__).parents[1]
OPTIONS = SimpleNamespace(
    name="hypersd", restore_if_deleted=True, create_experiment_kwargs=SimpleNamespace(artifact_location=None, tags=None)
)


def test_the_links_open_on_the_runs(server: Server) -> None:
    server.start()
    store = connect(server.uri, OPTIONS)
    run = store.client.create_run(store.experiment, run_name="full_distill tscd.loop.steps=50").info.run_id
    name = "lower is better/k4 4 steps fd_efficientnet_lite0_recon"
    store.client.log_metric(run, name, 12.5)
    store.client.set_terminated(run)
    with browser() as opened:
        wait = WebDriverWait(opened, 60)

        def shows(*texts: str) -> None:
            wait.until(lambda _: all(text in opened.find_element(By.TAG_NAME, "body").text for text in texts))

        documented = re.search(r"http://127\.0\.0\.1:5000(/\S+)", (ROOT / "README.md").read_text())
        assert documented and documented[1] in (ROOT / "docs/mlflow_dvc.md").read_text()
        opened.get(f"{server.uri}{documented[1].replace('/1/', f'/{store.experiment}/')}")
        shows("full_distill tscd.loop.steps=50", "1 matching run")
        opened.get("about:blank")
        opened.get(store.page(run).removeprefix("see "))
        shows("full_distill tscd.loop.steps=50", "Model metrics", name)
