"""Where the curves of a training can be watched while it runs: TensorBoard, or DVCLive for ``dvc plots`` and VS Code.

The table ``history.csv``, which appears when training is over, is written whatever the logger is.
"""

import math
import shutil
from dataclasses import asdict
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effvit.errors import UserError
from effvit.training.loop import Epoch

if TYPE_CHECKING:
    from lightning_fabric.loggers.logger import Logger

_DVC_YAML = """\
metrics:
- metrics.json
plots:
- plots/metrics:
    x: step
"""
_OURS = ("events.out.tfevents.*", "*.tsv", "metrics.json", "dvc.yaml")


class Curves:
    """The epochs of one run as curves, by a logger of Lightning Fabric's kind."""

    def __init__(self, logger: "Logger") -> None:
        self._logger = logger

    def log(self, epoch: Epoch) -> None:
        """Add one epoch; what was not measured is left out."""
        values = {name: value for name, value in asdict(epoch).items() if name != "epoch" and math.isfinite(value)}
        self._logger.log_metrics(values, step=epoch.epoch)
        self._logger.save()

    def close(self) -> None:
        """Write what is still in memory."""
        self._logger.finalize("success")


def check_logger(kind: str) -> None:
    """Raise ``UserError`` if the package of that logger is not installed."""
    if kind != "csv" and find_spec(kind) is None:
        raise UserError(f"logger={kind}: needs the package {kind}: pip install 'effvit[loggers]'")


def how_to_watch(kind: str, directory: Path) -> str:
    """One line that says where the curves are."""
    if kind == "tensorboard":
        return f"curves while it trains: tensorboard --logdir {directory}"
    return f"curves while it trains: `dvc plots show` or DVC in VS Code, from {directory}"


def open_curves(kind: str, directory: Path) -> Curves | None:
    """Return the curves of a run, to be written to ``directory``; those of an earlier run there are removed.

    None for ``csv``. DVC shows the curves if Git does not ignore the directory.

    Raises:
        UserError: the directory holds something else, or the logger does not start.
    """
    if kind == "csv":
        return None
    _clear(directory)
    directory.mkdir(parents=True)
    logger: Any = _tensorboard(directory) if kind == "tensorboard" else _dvclive(directory)
    try:
        logger.experiment  # noqa: B018 - starts it: now rather than after an epoch
    except Exception as error:  # of whatever kind: DVCLive asks Git
        raise UserError(f"logger={kind}: does not start here ({error})") from error
    if kind == "dvclive":  # which removes an earlier one as it starts
        (directory / "dvc.yaml").write_text(_DVC_YAML, encoding="utf-8")
    return Curves(logger)


def _tensorboard(directory: Path) -> "Logger":
    from lightning_fabric.loggers.tensorboard import TensorBoardLogger

    return TensorBoardLogger(directory, name="", version="")


def _dvclive(directory: Path) -> "Logger":
    from dvclive.fabric import DVCLiveLogger

    # Neither a DVC experiment nor an entry in the dvc.yaml at the top: the study has its own.
    quiet: dict[str, Any] = {"save_dvc_exp": False, "monitor_system": False, "report": None, "dvcyaml": None}
    return DVCLiveLogger(dir=str(directory), **quiet)


def _clear(directory: Path) -> None:
    for path in directory.rglob("*"):
        if not path.is_dir() and not any(fnmatchcase(path.name, pattern) for pattern in _OURS):
            raise UserError(f"{directory}: holds something else ({path.name}); move it, the curves are written there")
    shutil.rmtree(directory, ignore_errors=True)
