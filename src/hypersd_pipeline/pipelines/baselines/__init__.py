"""The methods that TSCD is compared with, as settings of the same terms."""

from .pipeline import create_pipeline

__all__ = ["create_pipeline"]
