"""The dedicated one-step UNet: a folder that diffusers loads, with its sampling contract and a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONTRACT = "sampling_contract.json"

_CARD = """---
library_name: diffusers
tags: [hyper-sd, one-step]
---
# One-step UNet

A UNet for one-step sampling without classifier-free guidance, trained on `{teacher}`.

```python
import torch
from diffusers import DiffusionPipeline, LCMScheduler, UNet2DConditionModel

unet = UNet2DConditionModel.from_pretrained("path/to/this/folder")
pipeline = DiffusionPipeline.from_pretrained("{teacher}", unet=unet)  # the model that it was trained on
pipeline.scheduler = LCMScheduler.from_pretrained("path/to/this/folder")
image = pipeline("a prompt", num_inference_steps=1, timesteps=[{time}], guidance_scale=0).images[0]
```
"""


def write_unet(folder: Path, unet: Any, contract: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Write the UNet (safetensors), LCMScheduler's config, the contract with ``metadata``, and a model card.

    Args:
        unet: diffusers' ``UNet2DConditionModel``. contract: of `Contract.to_json`, read.
    """
    unet.save_pretrained(folder, safe_serialization=True)
    scheduler = {"_class_name": contract["scheduler"], **contract["scheduler_config"]}
    (folder / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n")
    (folder / CONTRACT).write_text(json.dumps({**contract, **metadata}, indent=2) + "\n")
    teacher = metadata.get("teacher", "the teacher")
    source = "src/hypersd_pipeline/assets/teacher" if teacher == "shipped" else teacher
    (folder / "README.md").write_text(_CARD.format(teacher=source, time=contract["timesteps"][0]))
