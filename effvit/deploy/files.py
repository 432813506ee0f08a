"""A trained model as each runtime reads it: PyTorch's own two files, an ONNX file, and that with int8 weights."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from effvit.deploy.export import export_onnx
from effvit.deploy.int8 import quantize
from effvit.errors import UserError
from effvit.model.settings import CONFIG, WEIGHTS
from effvit.model.vit import ViT

if TYPE_CHECKING:
    from effvit.data.loading.prepared import Meta

OK = "ok"
RUNTIMES = ("onnx", "int8")  # next to eager PyTorch
PATTERNS = (WEIGHTS, CONFIG, "*.onnx")
"""Patterns of what a deployed model consists of."""
Figures = dict[str, object]


def write_files(model: ViT, model_dir: Path, meta: "Meta", directory: Path) -> Figures:
    """Write the files of all runtimes into ``directory``: those of ``model_dir``, ``onnx.onnx`` and ``int8.onnx``.

    Args:
        model: that of ``model_dir``, on the CPU, in eval mode.
        model_dir: what a training wrote.
        meta: the prepared data set whose normalisation and class names the ONNX files shall have.
        directory: an existing one.

    Returns:
        ``onnx_error``, the largest difference of logits to PyTorch's, and a ``status`` of each ONNX runtime: "ok", or
        "not supported: " and why; there is then no file.
    """
    for name in (WEIGHTS, CONFIG):
        shutil.copyfile(model_dir / name, directory / name)
    figures: Figures = {"onnx_status": OK, "onnx_error": None, "int8_status": OK}
    made = []
    try:
        figures["onnx_error"] = export_onnx(model, directory / "onnx.onnx", meta)
        made.append("onnx")
        quantize(directory / "onnx.onnx", directory / "int8.onnx")
        made.append("int8")
    except UserError as error:
        for runtime in (name for name in RUNTIMES if name not in made):
            (directory / f"{runtime}.onnx").unlink(missing_ok=True)  # what is there may be a part
            figures[f"{runtime}_status"] = f"not supported: {error}"
    return figures


def files_of(directory: Path) -> dict[str, Path]:
    """The ONNX files by runtime, those that could be made."""
    files = {runtime: directory / f"{runtime}.onnx" for runtime in RUNTIMES}
    return {runtime: file for runtime, file in files.items() if file.is_file()}
