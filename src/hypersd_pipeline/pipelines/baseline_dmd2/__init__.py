"""DMD2 (arXiv 2405.14867): distribution matching with a GAN term and no regression, from the teacher."""

from .pipeline import create_pipeline

__all__ = ["create_pipeline"]
