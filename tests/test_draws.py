"""Draws of a whole batch, of which each part takes its rows."""

import re
from pathlib import Path

import pytest
import torch

import hypersd_pipeline
from hypersd_pipeline import draws
from hypersd_pipeline.draws import Draws

PACKAGE = Path(hypersd_pipeline.__file__).parent


def draw(generator, rows):
    return [
        draws.randn((rows, 3), generator), draws.rand((rows,), generator, torch.float64), draws.randint(2, 9, (rows,), generator),
        draws.randint(0, 9, (), generator),
    ]  # fmt: skip


def test_one_part_draws_as_pytorch_does():
    found, plain = draw(Draws().manual_seed(1), 4), torch.Generator().manual_seed(1)
    wanted = [
        torch.randn(4, 3, generator=plain), torch.rand(4, generator=plain, dtype=torch.float64), torch.randint(2, 9, (4,), generator=plain),
        torch.randint(0, 9, (1,), generator=plain)[0],
    ]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(("passes", "ranks"), [(1, 2), (2, 1), (2, 2), (4, 1)])
def test_all_parts_together_have_what_one_draws(passes, ranks):
    whole, rows = Draws().manual_seed(1), 4 // (passes * ranks)
    wanted = draw(whole, 4)
    after = draw(whole, 4)
    generators = [Draws().manual_seed(1) for _ in range(ranks)]
    for expected in (wanted, after):  # two updates
        parts = []
        for part in range(passes):
            for rank, generator in enumerate(generators):
                generator.take(part, passes, rank, ranks)
                parts.append((part * 4 // passes + torch.arange(rank, rows * ranks, ranks), draw(generator, rows)))
        places = torch.cat([place for place, _ in parts])
        for number, tensor in enumerate(expected[:3]):
            assert torch.equal(torch.cat([drawn[number] for _, drawn in parts])[places.argsort()], tensor)
        assert all(torch.equal(drawn[3], expected[3]) for _, drawn in parts)


def test_what_is_drawn_apart_is_no_part_of_an_update():
    generator, plain = Draws().manual_seed(1), torch.Generator().manual_seed(1)
    generator.take(0, 2, 1, 2)
    first = torch.randn(8, 2, generator=plain)
    assert torch.equal(draws.randn((2, 2), generator), first[:4][1::2])
    with draws.apart(generator):
        assert torch.equal(draws.randn((2, 2), generator), torch.randn(4, 2, generator=plain)[1::2])
    generator.take(1, 2, 1, 2)
    assert torch.equal(draws.randn((2, 2), generator), first[4:][1::2])
    with draws.apart(plain):
        assert draws.randn((2,), plain).shape == (2,)


def test_a_pass_that_draws_more_stays_with_the_other_ranks():
    """A critic's second update in the last pass only."""
    found = []
    for rank in range(2):
        generator = Draws().manual_seed(1)
        drawn = []
        for part in range(2):
            generator.take(part, 2, rank, 2)
            drawn += [draws.randn((1, 2), generator) for _ in range(1 + part)]
            drawn.append(draws.rand((1,), generator))
        found.append((drawn, generator.get_state()))
    assert torch.equal(found[0][1], found[1][1])
    values = [value for drawn, _ in found for tensor in drawn for value in tensor.flatten().tolist()]
    assert len(set(values)) == len(values)  # and nothing is drawn twice


def test_what_a_stage_draws_goes_through_here():
    """PyTorch's own functions would give the same numbers to every rank."""
    files = [file for folder in ("training", "objectives") for file in (PACKAGE / folder).rglob("*.py")]
    found = [f"{file.name}: {line.strip()}" for file in [*files, PACKAGE / "data" / "cache.py"] for line in file.read_text().splitlines()
             if re.search(r"torch\.(rand|randn|randint|randperm|normal|multinomial|bernoulli)\(", line)]  # fmt: skip
    assert len(files) > 20 and not found
