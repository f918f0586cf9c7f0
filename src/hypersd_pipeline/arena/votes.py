"""Votes on blind pairs, in a database: SQLite, or another one that SQLAlchemy knows, such as PostgreSQL."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from sqlalchemy import CheckConstraint, Column, DateTime, Engine, MetaData, String, Table, Text, create_engine, func, insert, select
from sqlalchemy.exc import ArgumentError, IntegrityError, SQLAlchemyError

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.masking import masked

Choice = Literal["left", "right", "neither"]

TABLE = Table(
    "arena_votes",
    MetaData(),
    Column("pair", String(32), primary_key=True),
    Column("at", DateTime(timezone=True), nullable=False),
    Column("voter", String(36), nullable=False, index=True),
    Column("prompt", Text, nullable=False),
    Column("seed", String(20), nullable=False),
    Column("left_name", String(200), nullable=False),
    Column("left_key", String(32), nullable=False),
    Column("right_name", String(200), nullable=False),
    Column("right_key", String(32), nullable=False),
    Column("choice", String(7), CheckConstraint("choice in ('left', 'right', 'neither')"), nullable=False),
)


@dataclass(frozen=True)
class Vote:
    """One choice of a voter.

    Attributes:
        pair: the id that the pair was issued with. It can be voted on once.
        voter: a random id of a browser. Nothing else is known of a voter.
        left_name, left_key, right_name, right_key: the contenders by position, see `Contender`.
        choice: a position, or ``neither``.
    """

    pair: str
    voter: str
    prompt: str
    seed: str
    left_name: str
    left_key: str
    right_name: str
    right_key: str
    choice: Choice

    def __post_init__(self) -> None:
        if self.choice not in get_args(Choice):
            raise ValueError(f"{self.choice!r} is no choice")


class VoteStore:
    """The table of votes. Rows are added and never changed.

    Args:
        uri: SQLAlchemy's, such as ``sqlite:////folder/votes.db`` or ``postgresql://user@host/votes``.

    Raises:
        UserError: the database cannot be reached, or its driver is not installed.
    """

    def __init__(self, uri: str) -> None:
        try:
            self._engine: Engine = create_engine(uri, pool_pre_ping=True)
            TABLE.metadata.create_all(self._engine)
        except ModuleNotFoundError as error:
            raise UserError(f"HYPERSD_ARENA_DATABASE: its driver is missing; install it with pip install {error.name}.") from error
        except ArgumentError as error:
            raise UserError(
                "HYPERSD_ARENA_DATABASE is no address of a database; write it as postgresql://user:password@host/name, or unset it."
            ) from error
        except SQLAlchemyError as error:
            raise UserError(
                f"The votes' database {masked(uri)} cannot be used ({_reason(error)}); start it, or correct HYPERSD_ARENA_DATABASE."
            ) from error

    def add(self, vote: Vote) -> bool:
        """Write a vote. False where its pair was voted on before, and nothing is written."""
        try:
            with self._engine.begin() as connection:
                connection.execute(insert(TABLE).values(at=datetime.now(UTC), **asdict(vote)))
        except IntegrityError:
            return False
        return True

    def votes(self, keys: Iterable[str]) -> list[Vote]:
        """The votes on pairs of these contenders, oldest first. Votes on models that have changed since are left out."""
        known = list(keys)
        columns = [column for column in TABLE.columns if column.name != "at"]
        query = select(*columns).where(TABLE.c.left_key.in_(known), TABLE.c.right_key.in_(known)).order_by(TABLE.c.at, TABLE.c.pair)
        with self._engine.connect() as connection:
            return [Vote(**_row(row)) for row in connection.execute(query).mappings()]

    def counts(self) -> Counter[frozenset[str]]:
        """How many votes each pair of keys has, whichever was on the left."""
        query = select(TABLE.c.left_key, TABLE.c.right_key, func.count()).group_by(TABLE.c.left_key, TABLE.c.right_key)
        found: Counter[frozenset[str]] = Counter()
        with self._engine.connect() as connection:
            for left, right, count in connection.execute(query):
                found[frozenset((left, right))] += count
        return found

    def of_voter(self, voter: str) -> int:
        """How many votes a browser has given."""
        query = select(func.count()).select_from(TABLE).where(TABLE.c.voter == voter)
        with self._engine.connect() as connection:
            return int(connection.execute(query).scalar_one())

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()


def _row(row: Any) -> dict[str, Any]:
    return dict(row)


def _reason(error: SQLAlchemyError) -> str:
    told = " ".join(str(getattr(error, "orig", None) or error).split())
    return masked(told if len(told) <= 200 else f"{told[:197]}...").rstrip(".")
