"""Where the study keeps what: the only place that knows its folders."""

import sys
from pathlib import Path

import torch

from effvit.study.config import Study

PREPARED = Path("data/prepared")
METRICS = Path("metrics")
PLOTS = Path("plots")
REPORT = Path("report")


def load() -> tuple[Study, list[str]]:
    """Validated params.yaml, and the matrix items that DVC put on the command line."""
    return Study.load("params.yaml"), sys.argv[1:]


def load_as_trained() -> tuple[Study, list[str]]:
    """`load`, and as many threads as training has: the last digits of what a model gives depend on it."""
    params, items = load()
    if params.train.threads:
        torch.set_num_threads(params.train.threads)
    return params, items


def model_dir(dataset: str, attention: str, seed: str | int) -> Path:
    """Weights of one cell."""
    return Path("models", dataset, attention, f"seed{seed}")


def live_dir(dataset: str, attention: str, seed: str) -> Path:
    """Curves of one cell while it trains. Not ignored by Git: DVC would not show them."""
    return Path("live", dataset, attention, f"seed{seed}")


def deployed_dir(dataset: str, attention: str) -> Path:
    """Files of one cell's model for each runtime."""
    return Path("models/deployed", dataset, attention)


def cell_dir(dataset: str, attention: str, seed: str) -> Path:
    """Results of one cell, one directory a stage."""
    return METRICS / "cells" / dataset / attention / f"seed{seed}"


def as_options(options: dict[str, object]) -> list[str]:
    """Write a mechanism's options as the command line takes them."""
    return [f"{key}={value}" for key, value in options.items()]
