"""Votes in a real database, and who meets whom."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from arenas import contender, vote
from kedro.io import DatasetError
from servers import POSTGRES, postgres
from sqlalchemy import create_engine, text
from sqlalchemy.exc import IntegrityError

from hypersd_pipeline.arena.study import Study
from hypersd_pipeline.arena.votes import TABLE, VoteStore
from hypersd_pipeline.cli import readable
from hypersd_pipeline.io.votes import VotesDataset

PASSWORD = "hunter22"
needs_postgres = pytest.mark.skipif(not POSTGRES, reason="needs Postgres: apt-get install postgresql")
A, B, C = (contender("teacher", 25), contender("k4", 4), contender("k1", 1))


@pytest.fixture(scope="module")
def server():
    """A real Postgres. Not in pytest's folder, which another session of pytest closes for all users but root."""
    with TemporaryDirectory() as folder, postgres(Path(folder) / "postgres", PASSWORD) as address:
        yield address


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=needs_postgres)])
def uri(request, tmp_path):
    """An empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'votes.db'}"
        return
    address = request.getfixturevalue("server")
    yield address
    engine = create_engine(address)
    TABLE.metadata.drop_all(engine)
    engine.dispose()


@pytest.fixture
def store(tmp_path, uri):
    made = VotesDataset(filepath=str(tmp_path / "votes.db"), uri="" if uri.startswith("sqlite") else uri).load()
    yield made
    made.close()


def test_votes_come_back_as_they_were_given_and_last(uri, store):
    given = [vote(A, B, "left"), vote(B, A, "neither", "'; drop table arena_votes; --"), vote(A, C, "right")]
    assert all(map(store.add, given))
    again = VoteStore(uri)
    assert again.votes([A.key, B.key, C.key]) == given
    assert again.votes([A.key, B.key]) == given[:2]  # a model that changed has another key
    assert again.counts() == {frozenset((A.key, B.key)): 2, frozenset((A.key, C.key)): 1}
    again.close()


def test_a_pair_is_voted_on_once(store):
    with ThreadPoolExecutor(4) as pool:
        taken = list(pool.map(store.add, [vote(A, B, "left", pair="0" * 32) for _ in range(8)]))
    assert Counter(taken) == {True: 1, False: 7} and len(store.votes([A.key, B.key])) == 1


def test_the_database_itself_refuses_other_choices(uri, store):
    with pytest.raises(ValueError, match="both"):
        vote(A, B, "both")
    assert store.add(vote(A, B, "left"))
    engine = create_engine(uri)
    with engine.begin() as connection, pytest.raises(IntegrityError, match=r"(?i)check"):
        connection.execute(text("update arena_votes set choice = 'both'"))
    engine.dispose()


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("no address", "HYPERSD_ARENA_DATABASE is no address"),
        ("mysql+asyncmy://u@h/x", "driver is missing; install it with pip install asyncmy"),
        ("sqlite:////nowhere/at/all/votes.db", "unable to open database file"),
    ],
)
def test_a_database_that_cannot_be_used_is_one_sentence(tmp_path, uri, told):
    with pytest.raises(DatasetError) as raised:  # Kedro's, around what the command line prints
        VotesDataset(filepath=str(tmp_path / "votes.db"), uri=uri).load()
    assert told in (readable(raised.value) or "")
    assert not (tmp_path / "votes.db").exists()


def test_a_password_is_not_told(tmp_path):
    dataset = VotesDataset(filepath=str(tmp_path / "votes.db"), uri=f"sqlite://me:{PASSWORD}@/x")
    assert PASSWORD not in str(dataset._describe())
    with pytest.raises(DatasetError) as raised:
        dataset.load()
    assert PASSWORD not in str(raised.value)


def test_pairs_are_balanced_over_pairs_sides_and_prompts(store):
    study = Study(store, [A, B, C], ["a fox", "an owl"], seed=5, votes_per_voter=1000)
    left, prompts = Counter(), Counter()
    for _ in range(60):
        pair = study.next_pair("ann")
        left[pair.left.name] += 1
        prompts[pair.prompt, pair.seed] += 1
        assert study.vote(pair, "ann", "left")
    assert set(store.counts().values()) == {20}  # the pair with the fewest votes is next
    assert set(prompts) == {("a fox", 5), ("an owl", 6)}  # noise belongs to the prompt
    # each contender is in 40 of 60 pairs. 7 of 40 or fewer on the left: less than one in 20,000
    assert all(7 < left[c.name] < 33 for c in (A, B, C))


def test_a_voter_has_so_many_votes(store):
    study = Study(store, [A, B], ["a fox"], seed=0, votes_per_voter=2)
    pairs = [study.next_pair("ann") for _ in range(3)]  # three tabs
    assert [study.vote(pair, "ann", "left") for pair in pairs] == [True, True, False]
    assert study.next_pair("ann") is None and study.next_pair("bob") is not None
