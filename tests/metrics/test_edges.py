"""Edges and their F1, by values that can be counted by hand."""

import pytest
import torch

from hypersd_pipeline.metrics.edges import condition_of, edge_f1, edges_of, grown


def line(column: int, rows: range = range(8)) -> torch.Tensor:
    edges = torch.zeros(8, 8, dtype=torch.bool)
    edges[list(rows), column] = True
    return edges


def test_f1_by_hand():
    assert edge_f1(line(3), line(3), 1) == edge_f1(line(4), line(3), 1) == 1.0
    assert edge_f1(line(5), line(3), 1) == 0.0 and edge_f1(line(5), line(3), 2) == 1.0
    # half of the line: everything found is wanted; of the 8 wanted, rows 0-3 and, one pixel off, row 4
    assert edge_f1(line(3, range(4)), line(3), 1) == pytest.approx(2 * 1 * (5 / 8) / (1 + 5 / 8))
    # a second line that nobody asked for: precision 1/2, recall 1
    assert edge_f1(line(3) | line(7), line(3), 1) == pytest.approx(2 / 3)


def test_f1_without_edges():
    none = torch.zeros(8, 8, dtype=torch.bool)
    assert edge_f1(none, none, 1) == 1.0
    assert edge_f1(none, line(3), 1) == edge_f1(line(3), none, 1) == 0.0


def test_edges_follow_a_square_and_a_change_of_colour_alone():
    image = torch.zeros(3, 64, 64)
    image[:, 16:48, 16:48] = 1.0
    edges = edges_of(image, "canny")
    rows, columns = edges.nonzero().T
    assert {int(rows.min()), int(columns.min())} <= {15, 16} and {int(rows.max()), int(columns.max())} <= {47, 48}
    assert not edges[20:44, 20:44].any() and edges.sum() > 4 * 28
    colours = torch.tensor([0.8, 0.2, 0.2])[:, None, None].expand(3, 64, 64).clone()
    colours[:, :, 32:] = torch.tensor([0.2, 0.5, 0.2])[:, None, None]
    assert edges_of(colours, "canny").any()


def test_a_scribble_is_coarse_and_thick():
    image = torch.zeros(3, 64, 64)
    image[:, 16:48, 16:48] = 1.0
    image[:, 32, 24:40] = 0.75  # a thin stripe, which a scribble leaves out
    assert edges_of(image, "canny")[26:38, 26:38].any() and not edges_of(image, "scribble")[26:38, 26:38].any()
    edges = edges_of(image, "scribble")
    condition = condition_of(edges, "scribble")
    assert condition.shape == (3, 64, 64) and set(condition.unique().tolist()) == {0.0, 1.0}
    assert condition[0].sum() > 2 * edges.sum() and torch.equal(condition[0] > 0, grown(edges, 2))
    assert torch.equal(condition_of(edges, "canny")[1] > 0, edges)
