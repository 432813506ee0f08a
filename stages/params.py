"""Compose params.yaml from conf/ with its defaults, as `dvc exp run` does with its -S."""

from pathlib import Path

from dvc.utils.hydra import compose_and_dump

compose_and_dump("params.yaml", str(Path("conf").resolve()), None, "config", "", [])
