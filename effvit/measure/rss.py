"""Resident memory of a training step as the operating system sees it, in a process of its own.

A cross-check of ``memory.peak_bytes``: it also sees what libraries allocate outside PyTorch, and the allocator's
waste. Run as ``python -m effvit.measure.rss`` this module is that process.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from effvit.measure.execution import Execution
from effvit.measure.workload import adamw, training_step
from effvit.memory import is_out_of_memory, peak_resident_bytes, status_bytes
from effvit.model.vit import ViT, ViTConfig

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def max_rss_bytes(configs: Sequence[ViTConfig], batch_size: int, precision: str = "float32") -> list[int | None]:
    """Most resident bytes of one training step of each model, above a process in which all is built and warm.

    The processes run at the same time. None for a process that ran out of memory.
    """
    workers = []
    for config in configs:
        job = {"config": config.model_dump(), "batch_size": batch_size, "precision": precision}
        job["threads"] = torch.get_num_threads()
        command = [sys.executable, "-m", "effvit.measure.rss", json.dumps(job)]
        workers.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    results = [(worker, *worker.communicate()) for worker in workers]
    return [_result(worker, out, err) for worker, out, err in results]


def _result(worker: "subprocess.Popen[str]", out: str, err: str) -> int | None:
    if worker.returncode == 0:
        return int(out)
    if worker.returncode == -9 or is_out_of_memory(RuntimeError(err)):  # the kernel ends what asks for too much
        return None
    raise RuntimeError(f"effvit.measure.rss failed:\n{err}")


def _measure(job: str) -> int:
    settings = json.loads(job)
    torch.set_num_threads(settings["threads"])
    device, how = torch.device("cpu"), Execution(settings["precision"])
    model = ViT(ViTConfig(**settings["config"])).to(device)
    optimiser = adamw(model)
    # Creates the optimiser's state, and loads the code that a step needs: resident memory too.
    training_step(model, optimiser, 1, device, how)()
    step = training_step(model, optimiser, settings["batch_size"], device, how)
    before = _rss_reset_peak()
    step()
    return max(0, peak_resident_bytes() - before)


def _rss_reset_peak() -> int:
    """Bytes resident now, from which the peak is counted."""
    if not _STATUS.exists():
        return peak_resident_bytes()
    try:
        _CLEAR.write_text("5")
    except OSError:
        return status_bytes("VmHWM")  # no permission: only what exceeds the earlier peak can be seen
    return status_bytes("VmRSS")


if __name__ == "__main__":
    print(_measure(sys.argv[1]))
