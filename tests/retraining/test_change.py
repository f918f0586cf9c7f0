"""Whether data changed: keys of rows, counts, drift."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.retraining.change import DataState, change_of, read_state, write_state

LIMITS = {"min_rows": 1, "max_drift": 0.25}


def state(train: list[int], words: float = 5.0, shares: dict[str, float] | None = None) -> DataState:
    keys = {"train": torch.tensor(train), "test": torch.tensor([7, 9])}
    return DataState(keys, {"caption_words": (words, 2.0), "width": (64.0, 0.0)}, shares or {"a": 0.5, "cat": 0.5})


def test_equal_data_are_no_reason():
    found = change_of(state([1, 2, 3]), state([1, 2, 3]), **LIMITS)
    assert found.reasons == () and found.added == found.removed == {"train": 0, "test": 0}
    assert found.rows == {"train": 3, "test": 2} and set(found.drift.values()) == {0.0}


def test_new_and_missing_rows_are_counted_by_split_and_repeated_rows_too():
    found = change_of(state([1, 2, 2]), state([2, 2, 2, 4]), **LIMITS)
    assert found.added == {"train": 2, "test": 0} and found.removed == {"train": 1, "test": 0}
    assert found.reasons == ("2 rows are new and 1 are gone.",)


def test_a_row_that_moves_to_another_split_is_a_change():
    before = state([1, 2, 7])
    found = change_of(before, replace(before, keys={"train": torch.tensor([1, 2]), "test": torch.tensor([7, 7, 9])}), **LIMITS)
    assert found.added == {"train": 0, "test": 1} and found.removed == {"train": 1, "test": 0}


def test_few_rows_are_waited_for_unless_they_move_the_statistics():
    patient = {**LIMITS, "min_rows": 10}
    assert change_of(state([1, 2]), state([1, 2, 3], words=5.4), **patient).reasons == ()
    moved = change_of(state([1, 2]), state([1, 2, 3], words=6.0), **patient)
    assert moved.drift["caption_words"] == 0.5 and moved.reasons == ("caption_words drifted by 0.50, more than 0.25.",)
    other = change_of(state([1, 2]), state([1, 2, 3], shares={"a": 0.5, "dog": 0.5}), **patient)
    assert other.drift["words"] == pytest.approx(0.5**0.5) and other.reasons == ("words drifted by 0.71, more than 0.25.",)


def test_the_first_data_and_an_order_are_reasons():
    assert change_of(None, state([1]), **LIMITS).reasons == ("There is no version that was judged before.",)
    assert change_of(state([1]), state([1]), **LIMITS, force=True).reasons == ("retrain.force asks for it.",)


def test_a_state_survives_its_file_and_a_damaged_one_is_one_sentence(tmp_path: Path):
    written = state([-5, 2**62], shares={"müll": 1.0})
    write_state(tmp_path, written)
    found = read_state(tmp_path)
    assert all(found.keys[name].equal(written.keys[name]) for name in written.keys)
    assert (found.statistics, found.words) == (written.statistics, written.words)
    (tmp_path / "data.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"data\.safetensors: what the last version was trained on cannot be read .* set retrain\.force"):
        read_state(tmp_path)
