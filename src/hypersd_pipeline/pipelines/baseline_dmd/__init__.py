"""DMD without TSCD (the paper's ablation): distribution matching with regression on the teacher's pairs, from the teacher."""

from .pipeline import create_pipeline

__all__ = ["create_pipeline"]
