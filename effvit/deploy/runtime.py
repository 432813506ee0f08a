"""ONNX files under onnxruntime, on one thread of the CPU."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

    from effvit.data.loading.prepared import Images

INPUT, OUTPUT = "images", "logits"


def open_session(path: Path) -> "InferenceSession":
    """Load an ONNX file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def logits(session: "InferenceSession", images: np.ndarray) -> np.ndarray:
    """Logits ``(n, classes)`` of normalised float32 images ``(n, channels, H, W)``."""
    (result,) = session.run([OUTPUT], {INPUT: images})
    return np.asarray(result)


def predict_one_by_one(
    session: "InferenceSession", images: "Images", mean: Sequence[float], std: Sequence[float]
) -> np.ndarray:
    """Predicted classes ``(n,)`` of uint8 images ``(n, H, W, 3)``, each in a batch of its own.

    So a prediction is the image's own: int8 activations are scaled by the largest of their batch.
    """
    import torch

    from effvit.data.loading.transforms import to_float

    batches = (to_float(torch.from_numpy(images[i : i + 1]), mean, std).numpy() for i in range(len(images)))
    return np.array([logits(session, batch).argmax() for batch in batches])
