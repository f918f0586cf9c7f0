"""Base class of every configuration object."""

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """A frozen config that refuses unknown keys, so that a misspelt key in ``conf/`` is an error and not a default."""

    model_config = ConfigDict(extra="forbid", frozen=True)
