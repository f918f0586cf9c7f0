"""A network as ONNX, by PyTorch's exporter, and compared with PyTorch in onnxruntime."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.backbones import Backbone

MODEL, CHECK = "model.onnx", "check.json"

TOLERANCE = 1e-3
"""Largest difference between onnxruntime and PyTorch, as a share of the largest value of the output. In float32 it is about 1e-6."""


class _Call(nn.Module):
    """A network as a function of tensors."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.module = backbone.module  # the exporter takes the weights of a module
        self._backbone = (backbone,)

    def forward(self, x_t: Tensor, t: Tensor, prompt_embeds: Tensor, pooled: Tensor | None = None, sizes: Tensor | None = None) -> Tensor:
        return self._backbone[0](x_t, t, Conditioning(prompt_embeds, pooled, sizes))


def write_onnx(folder: Path, backbone: Backbone, x_t: Tensor, t: Tensor, cond: Conditioning, metadata: Mapping[str, str]) -> float:
    """Write ``model.onnx`` with its weights beside it, run it in onnxruntime, and write the comparison.

    Batch and sides of the image may vary in the file. The names of inputs are diffusers'.

    Args:
        backbone: float32, on the CPU. x_t: ``[b, c, h, w]`` with b of at least 2. t: int64 ``[b]``. They are examples.
        metadata: strings that the file carries.

    Returns:
        The largest difference between onnxruntime's and PyTorch's output, divided by the output's largest value.

    Raises:
        UserError: the difference is above `TOLERANCE`.
    """
    call = _Call(backbone).eval()
    inputs = [x_t, t, *(x for x in (cond.prompt_embeds, cond.pooled, cond.sizes) if x is not None)]
    names = list(backbone.input_names[: len(inputs)])
    free = torch.export.Dim.AUTO
    shapes = ({0: free, 2: free, 3: free}, *({0: free} for _ in inputs[1:]))
    with torch.no_grad(), warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")  # of the exporter's own modules
        program: Any = torch.onnx.export(
            call, tuple(inputs), dynamo=True, input_names=names, output_names=["out_sample"], dynamic_shapes=shapes, verbose=False
        )
    _forget_paths(program.model)
    program.model.metadata_props.update(metadata)
    program.save(str(folder / MODEL), external_data=True)
    difference = max(_difference(folder / MODEL, call, names, example) for example in (inputs, [x[:1] for x in inputs]))
    if not difference <= TOLERANCE:  # NaN too
        raise UserError(
            f"export.formats: onnxruntime differs from PyTorch by {difference:.2g} of the largest value, which is more than {TOLERANCE:g}; "
            f"leave onnx out."
        )
    told = {"difference": difference, "tolerance": TOLERANCE, "inputs": names, "torch": str(torch.__version__)}
    (folder / CHECK).write_text(json.dumps(told, indent=2) + "\n")
    return difference


def _difference(path: Path, call: nn.Module, names: list[str], inputs: list[Tensor]) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = call(*inputs)
    (found,) = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
    return float((torch.from_numpy(found) - expected).abs().max() / expected.abs().max())


def _forget_paths(model: Any) -> None:
    """Remove what the exporter notes of each operation: stack traces with paths of this machine among it."""
    for graph in (model.graph, *model.functions.values()):
        for node in graph:
            node.metadata_props.clear()
            for value in node.outputs:
                value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


class _quiet:
    """The exporter's log, without what is below a warning of ours."""

    def __enter__(self) -> None:
        self._log = logging.getLogger("torch.onnx")
        self._level = self._log.level
        self._log.setLevel(logging.ERROR)

    def __exit__(self, *_: Any) -> None:
        self._log.setLevel(self._level)
