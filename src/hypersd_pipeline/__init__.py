"""Hyper-SD training: from a diffusion teacher to LoRAs that generate in 1, 2, 4 or 8 steps."""

import warnings

from hypersd_pipeline import compat

__version__ = "0.1.0"

compat.install()
# said by MLflow of a model class inside kedro-mlflow, at every command
warnings.filterwarnings("ignore", message="(?s).*Add type hints to the `predict` method")
