"""Attention drawn over the image it belongs to."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image


def overlay(image: np.ndarray, patch_map: np.ndarray, strength: float = 0.6) -> np.ndarray:
    """Blend a map over its image: uint8 ``(H, W, 3)`` and ``(gh, gw)`` of any scale give uint8 ``(H, W, 3)``."""
    low, high = float(patch_map.min()), float(patch_map.max())
    scaled = (patch_map - low) / (high - low) if high > low else np.zeros_like(patch_map)
    height, width = image.shape[:2]
    smooth = Image.fromarray(scaled.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    heat = matplotlib.colormaps["inferno"](np.asarray(smooth))[..., :3] * 255
    return ((1 - strength) * image + strength * heat).round().astype(np.uint8)


def map_sheet(images: Sequence[np.ndarray], maps: Sequence[np.ndarray], titles: Sequence[str], heading: str) -> Figure:
    """One column an image: the image with its title above, its map laid over it below."""
    figure = Figure(figsize=(1.5 * len(images) + 0.2, 3.5), layout="constrained")
    axes = figure.subplots(2, len(images), squeeze=False)
    for (top, bottom), image, patch_map, title in zip(axes.T, images, maps, titles, strict=True):
        top.imshow(image)
        top.set_title(title, fontsize=8, parse_math=False)
        bottom.imshow(overlay(image, patch_map))
    for axis in axes.flat:
        axis.set_axis_off()
    figure.suptitle(heading, fontsize=10)
    return figure
