"""DVC's experiments, as the commands that gather a sweep read them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from effvit.errors import UserError


def experiments(repository: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield the experiments on the current commit, newest first: the file system of each and its parameters.

    Raises:
        UserError: no Git repository with DVC.
    """
    from dvc.api import DVCFileSystem

    for row in sorted(_rows(repository), key=lambda row: str(row.get("Created") or ""), reverse=True):
        if row.get("rev") != "workspace" and row.get("Experiment"):
            files = DVCFileSystem(str(repository), rev=row["Experiment"])
            yield files, yaml.safe_load(files.read_text("params.yaml"))


def _rows(repository: Path) -> list[dict[str, Any]]:
    from dvc.api import exp_show
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from scmrepo.exceptions import SCMError

    try:
        Repo.find_root(str(repository))  # before DVC takes a directory that is no repository for one to clone
        return list(exp_show(str(repository)))
    except (DvcException, SCMError) as error:
        raise UserError(f"--repository {repository}: {error}; expected a Git repository with DVC") from error
