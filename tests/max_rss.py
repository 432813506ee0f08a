"""Resident memory of a training step as the operating system sees it, in a process of its own.

It also sees what libraries allocate outside PyTorch, and the allocator's waste. Run as a script this file is that
process.
"""

import json
import subprocess
import sys
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def max_rss_bytes(config, batch_size):
    """Most resident bytes of a training step, above a process in which all is built and warm."""
    job = json.dumps({"config": config.model_dump(), "batch_size": batch_size})
    return int(subprocess.run([sys.executable, __file__, job], check=True, stdout=subprocess.PIPE).stdout)


def _measure(config, batch_size):
    import torch

    from effvit.measure.workload import adamw, training_step
    from effvit.memory import peak_resident_bytes
    from effvit.model.vit import ViT, ViTConfig

    model, cpu = ViT(ViTConfig(**config)), torch.device("cpu")
    optimiser = adamw(model)
    # Creates the optimiser's state, and loads the code that a step needs: resident memory too.
    training_step(model, optimiser, 1, cpu)()
    step = training_step(model, optimiser, batch_size, cpu)
    before = _rss_reset_peak()
    step()
    return max(0, peak_resident_bytes() - before)


def _rss_reset_peak():
    """Bytes resident now, from which the peak is counted."""
    from effvit.memory import peak_resident_bytes, status_bytes

    if not _STATUS.exists():
        return peak_resident_bytes()
    try:
        _CLEAR.write_text("5")
    except OSError:
        return status_bytes("VmHWM")  # no permission: only what exceeds the earlier peak can be seen
    return status_bytes("VmRSS")


if __name__ == "__main__":
    print(_measure(**json.loads(sys.argv[1])))
