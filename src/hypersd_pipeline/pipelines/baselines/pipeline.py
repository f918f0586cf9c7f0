"""Every baseline. ``--tags lcm`` runs one. Their settings are in ``conf/base/parameters_baselines.yml``."""

from typing import Any

from kedro.pipeline import Pipeline

from hypersd_pipeline.pipelines.nodes import distil_pipeline, reference_node, unified_pipeline

DISTILLED = {
    **{name: (name,) for name in ("lcm", "tcd", "scm", "pcm")},
    "progressive": tuple(f"progressive_k{k}" for k in (8, 4, 2, 1)),
}
"""Method -> its stages, each of which starts from the one before."""
MATCHED = ("dmd2", "dmd", "dmd2_levels", "dmd_decoupled")
"""Methods that match distributions, from the teacher itself."""


def create_pipeline(**_: Any) -> Pipeline:
    """``latents`` -> ``lora_lcm``, ``lora_tcd``, ``lora_pcm``, ``lora_progressive_k8`` ... ``lora_dmd``, and their metrics."""
    parts = [Pipeline([reference_node()], tags=[*DISTILLED, *MATCHED])]
    for method, stages in DISTILLED.items():
        before = (None, *stages)
        parts += [distil_pipeline(f"baseline_{name}", name, start, method) for name, start in zip(stages, before, strict=False)]
    parts += [unified_pipeline(f"baseline_{name}", name, [], {}, name) for name in MATCHED]
    return sum(parts, Pipeline([]))
