"""A trained model as one ONNX file that gives PyTorch's output, and says how its images are to be prepared."""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from effvit.deploy.runtime import INPUT, OUTPUT, logits, open_session
from effvit.errors import UserError
from effvit.files import staged_file
from effvit.model.vit import ViT

if TYPE_CHECKING:
    import onnx

    from effvit.data.loading.prepared import Meta

OPSET = 20  # the first with Gelu as an operator
TOLERANCE = 1e-4
_MOST_BYTES = 2**31  # of a protobuf message


def export_onnx(model: ViT, path: Path, meta: "Meta | None" = None) -> float:
    """Write ``model`` to ``path``, once onnxruntime's logits are PyTorch's.

    The graph maps float32 ``images`` ``(batch, channels, image_size, image_size)`` to ``logits`` ``(batch, classes)``,
    for any batch.

    Args:
        model: on the CPU, in eval mode.
        path: file to write; replaced when all is well.
        meta: the prepared data set whose normalisation and class names the file's metadata shall have; without one
            they are those that the model knows.

    Returns:
        The largest difference to PyTorch's logits, over batches of one and of three random images.

    Raises:
        UserError: ``path`` is no place for it; PyTorch cannot export the mechanism; the logits differ by more than
            ``TOLERANCE``.
    """
    check_output(path)
    if sum(tensor.nbytes for tensor in model.state_dict().values()) >= _MOST_BYTES:
        raise UserError("the model has 2 GiB of weights or more, which one ONNX file cannot hold")
    graph = _graph(model)
    _describe(graph, model, meta)
    with staged_file(path) as aside:
        aside.write_bytes(graph.SerializeToString(deterministic=True))
        error = _largest_difference(model, aside)
        if not error <= TOLERANCE:  # nor where it is not a number
            raise UserError(
                f"{model.config.attention}: onnxruntime's logits differ from PyTorch's by {error:.1e}, "
                f"at most {TOLERANCE:.0e} is right; no file is written"
            )
    return error


def check_output(path: Path, suffix: str = ".onnx") -> None:
    """Raise ``UserError`` where ``path`` cannot be a file of that kind to write."""
    if path.suffix != suffix:
        raise UserError(f"{path}: expected a file name that ends in {suffix}")
    if path.is_dir():
        raise UserError(f"{path}: is a directory, expected a file to write")


def _graph(model: ViT) -> "onnx.ModelProto":
    with _quiet():
        try:
            program = torch.onnx.export(
                model,
                (_images(model, 2),),  # two: a batch of one would be taken for a constant
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            cause = str(error.__cause__ or error).strip().partition("\n")[0]
            raise UserError(f"{model.config.attention}: PyTorch cannot export it to ONNX: {cause}") from error
    assert program is not None
    graph = program.model_proto
    # Stack traces of this machine, a quarter of a small file.
    for part in (graph.graph, *graph.graph.node, *graph.graph.value_info, *graph.graph.initializer):
        part.ClearField("metadata_props")
    return graph


def _describe(graph: "onnx.ModelProto", model: ViT, meta: "Meta | None") -> None:
    import onnx

    config = model.config
    notes: dict[str, Any] = {"attention": config.attention, "image_size": config.image_size}
    notes |= model.trained_on.known()
    if meta is not None:
        notes |= {"dataset": meta.name, "classes": meta.classes, "mean": meta.mean, "std": meta.std}
    onnx.helper.set_model_props(
        graph, {key: value if isinstance(value, str) else json.dumps(value) for key, value in notes.items()}
    )


def _largest_difference(model: ViT, path: Path) -> float:
    session = open_session(path)
    differences = []
    for batch in (1, 3):
        images = _images(model, batch)
        with torch.inference_mode():
            expected = model(images).numpy()
        differences.append(float(np.abs(logits(session, images.numpy()) - expected).max()))
    return float(np.max(differences))


def _images(model: ViT, batch: int) -> torch.Tensor:
    config = model.config
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, config.num_channels, *config.image_shape, generator=generator)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's talk about its own workings off the terminal."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
