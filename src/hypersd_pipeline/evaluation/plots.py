"""Plots of an evaluation."""

from __future__ import annotations

import numpy as np
import pandas as pd
from PIL import Image

from hypersd_pipeline.training.guard import HELD_OUT, TRAINED


def tradeoff_plot(frame: pd.DataFrame) -> Image.Image:
    """Reward, trained and held out, against distance from the distilled model's images; a point per weight."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for axes, column, title in zip(figure.subplots(1, 2), (TRAINED, HELD_OUT), ("trained rewards", "held-out reward"), strict=True):
        axes.plot(frame["distance"], frame[column], "o-", linewidth=1)
        for _, line in frame.iterrows():
            axes.annotate(f"{line['weight']:g}", (line["distance"], line[column]), textcoords="offset points", xytext=(4, 4), fontsize=8)
        axes.set(xlabel="distance from the distilled model's images (cosine)", ylabel="mean score", title=title)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
