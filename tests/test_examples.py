"""The examples run by themselves, on the core of the package alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_packaging import WITHOUT_EXTRAS

from hypersd_pipeline.data.memory import MemoryRows
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def test_each_example_is_described():
    assert re.findall(r"^\| `(\w+\.py)` \|", (ROOT / "examples" / "README.md").read_text(), re.MULTILINE) == EXAMPLES


@pytest.mark.slow
def test_an_objective_of_ones_own_is_learned_without_the_extras(tmp_path):
    code = f"{WITHOUT_EXTRAS}\nimport runpy\nrunpy.run_path({str(ROOT / 'examples' / 'own_objective.py')!r}, run_name='__main__')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    before, after = map(float, re.search(r"([\d.]+) before, ([\d.]+) after", result.stdout).groups())
    assert after < 0.8 * before
    assert not any(tmp_path.iterdir())  # nothing is left behind


def test_rows_in_memory_are_what_a_split_of_the_cache_is():
    teacher = load_teacher(TeacherConfig(), parts=("backbone", "text"), device="cpu")
    prompts = ["a turtle in the centre, blue background", "a blossom in the centre, blue background"]
    rows = MemoryRows.drawn_by(teacher, prompts, steps=2)
    picks = torch.tensor([1, 0, 1])
    assert len(rows) == 2 and rows.latent_shape == teacher.latent_shape
    assert rows.captions(picks) == [prompts[1], prompts[0], prompts[1]]
    assert torch.equal(rows.sample(picks, torch.Generator())[0], rows.latents[1])
    torch.testing.assert_close(rows.conditioning(picks).prompt_embeds, teacher.encode_prompts(prompts)[picks].prompt_embeds)
    torch.testing.assert_close(rows.unconditional(3).prompt_embeds, teacher.unconditional(3).prompt_embeds)
    assert torch.equal(rows.latents, MemoryRows.drawn_by(teacher, prompts, steps=2).latents)  # drawn by the seed
    assert not torch.equal(rows.latents, MemoryRows.drawn_by(teacher, prompts, steps=2, seed=1).latents)
