"""Blind pairs: which two contenders meet, for which prompt, on which side, and the vote on them."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from hypersd_pipeline.arena.contenders import Contender
from hypersd_pipeline.arena.votes import Choice, Vote, VoteStore

_CHANCE = secrets.SystemRandom()
"""Voters cannot foresee a pair."""


@dataclass(frozen=True)
class Pair:
    """Two contenders as a voter sees them. It stays on the server. seed: of the noise, which both share."""

    id: str
    prompt: str
    seed: int
    left: Contender
    right: Contender


class Study:
    """Gives out pairs and takes votes.

    Args:
        seed: of the first prompt's noise. The n-th prompt's is ``seed + n``, so that an image of a study is made again from its vote.
    """

    def __init__(self, store: VoteStore, several: Sequence[Contender], prompts: Sequence[str], seed: int, votes_per_voter: int) -> None:
        self._store, self._prompts, self._seed, self._most = store, list(prompts), seed, votes_per_voter
        self._pairs = list(combinations(several, 2))

    def next_pair(self, voter: str) -> Pair | None:
        """A pair with the fewest votes so far, a prompt and sides at random. None where the voter has voted often enough."""
        if self._store.of_voter(voter) >= self._most:
            return None
        counts = self._store.counts()
        fewest = min(counts[_keys(pair)] for pair in self._pairs)
        pair = list(_CHANCE.choice([pair for pair in self._pairs if counts[_keys(pair)] == fewest]))
        _CHANCE.shuffle(pair)
        row = _CHANCE.randrange(len(self._prompts))
        return Pair(secrets.token_hex(16), self._prompts[row], self._seed + row, *pair)

    def vote(self, pair: Pair, voter: str, choice: Choice) -> bool:
        """Write a vote. False where it does not count: the pair was voted on before, or the voter has voted often enough."""
        if self._store.of_voter(voter) >= self._most:  # pairs may have been issued to several tabs
            return False
        left, right = pair.left, pair.right
        return self._store.add(Vote(pair.id, voter, pair.prompt, str(pair.seed), left.name, left.key, right.name, right.key, choice))


def _keys(pair: Sequence[Contender]) -> frozenset[str]:
    return frozenset(contender.key for contender in pair)
