"""The terms that a stage can be made of, one file each: a configuration (``kind``, ``weight``, ...) and a loss at the prediction."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from hypersd_pipeline.training.terms.adversarial import AdversarialConfig
from hypersd_pipeline.training.terms.anchor import AnchorConfig
from hypersd_pipeline.training.terms.base import Context, Cost, Prediction, Scalars, Term, TermConfig, View
from hypersd_pipeline.training.terms.consistency import ConsistencyConfig
from hypersd_pipeline.training.terms.matching import MatchingConfig
from hypersd_pipeline.training.terms.perceptual import PerceptualConfig
from hypersd_pipeline.training.terms.regression import RegressionConfig
from hypersd_pipeline.training.terms.reward import RewardTermConfig

__all__ = [
    "AdversarialConfig",
    "AnchorConfig",
    "AnyTerm",
    "ConsistencyConfig",
    "Context",
    "Cost",
    "MatchingConfig",
    "PerceptualConfig",
    "Prediction",
    "RegressionConfig",
    "RewardTermConfig",
    "Scalars",
    "Term",
    "TermConfig",
    "View",
]

AnyTerm = Annotated[
    ConsistencyConfig | MatchingConfig | RegressionConfig | RewardTermConfig | AnchorConfig | PerceptualConfig | AdversarialConfig,
    Field(discriminator="kind"),
]
"""The configuration of any term. ``kind`` tells which. A stage's terms are always taken in this order."""
