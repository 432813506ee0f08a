"""Memory of a process that does nothing but load a model and classify one image, as the operating system counts it.

Run as ``python -m effvit.deploy.footprint FILE`` this module is that process.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from effvit.memory import peak_resident_bytes


def peak_rss_bytes(models: Sequence[Path | None]) -> list[int | None]:
    """Most resident bytes of a fresh process for each model, interpreter and libraries included, on one thread.

    Args:
        models: an ONNX file, which onnxruntime runs, or the directory of a trained model, which PyTorch runs; None
            has no process and gives None.

    The processes run at the same time.
    """
    workers = [None if model is None else _start(model) for model in models]
    return [None if worker is None else _result(worker) for worker in workers]


def _start(model: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "effvit.deploy.footprint", str(model)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _result(worker: "subprocess.Popen[str]") -> int:
    out, _ = worker.communicate()
    if worker.returncode:
        raise RuntimeError(f"effvit.deploy.footprint ended with status {worker.returncode}")
    return int(out)


def _run(model: Path) -> None:
    if model.is_dir():
        import torch

        from effvit.model.checkpoint import load_model

        torch.set_num_threads(1)
        vit = load_model(model)
        with torch.inference_mode():
            vit(torch.zeros(1, vit.config.num_channels, *vit.config.image_shape))
    else:
        import numpy as np

        from effvit.deploy.runtime import INPUT, logits, open_session

        session = open_session(model)
        (images,) = session.get_inputs()
        assert images.name == INPUT
        logits(session, np.zeros((1, *images.shape[1:]), np.float32))


if __name__ == "__main__":
    _run(Path(sys.argv[1]))
    print(peak_resident_bytes())
