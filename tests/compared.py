"""Finished runs that tests compare: folders with images and scores, as an evaluation leaves them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image

from hypersd_pipeline.evaluation.samples import write_samples
from hypersd_pipeline.evaluation.scores import PromptScores

PROMPTS = ["a fox", "two cats, one <b>owl</b>", "a penguin in the centre", *(f"prompt {i}" for i in range(29))]
STEPS = (1, 2, 4, 8)


def write_run(folder: Path, gain: float, colour: str, seconds: float, seed: int = 0, model: str = "k4") -> Path:
    """A data folder whose model's distance is lower by `gain` at one and two steps than it is without, and whose images have one colour.

    Args:
        seed: of the noise, as far as the scores say.
    """
    reporting = folder / "08_reporting"
    hard = torch.randn(len(PROMPTS), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for name, own, shown in (("teacher_samples", 0.0, "gray"), (f"samples_{model}", gain, colour)):
        noise = torch.Generator().manual_seed(int(own) + 1)
        values = {
            n: {
                "fd_efficientnet_lite0_recon": 100 / n
                - own * (n < 4)
                + 5 * hard
                + torch.randn(len(hard), generator=noise, dtype=torch.float64),
                "clip_score": 20 + n / 4 + hard + torch.randn(len(hard), generator=noise, dtype=torch.float64) / 9,
            }
            for n in STEPS
        }
        scores = PromptScores(PROMPTS, {"seed": str(seed), "reference": "r", "judges": "j"}, values)
        (reporting / name).mkdir(parents=True, exist_ok=True)
        write_samples(reporting / name, {n: [Image.new("RGB", (64, 64), shown)] * 4 for n in STEPS}, scores)
    report = {"train_seconds": seconds, "peak_memory_mb": 1500.0}
    (reporting / f"report_{model}.json").write_text(json.dumps(report))
    return folder
