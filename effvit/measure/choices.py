"""Rows of `effvit choose` on disk: a file for each machine, with the rows of every model measured on it."""

import io
import os
import re
from pathlib import Path

import pandas as pd

from effvit.device import Machine
from effvit.errors import UserError
from effvit.files import write_csv

_SUBJECT = ["model", "batch_size"]  # rows of the same are replaced


def open_output(output: Path, machine: Machine, precision: str) -> tuple[Path, pd.DataFrame | None]:
    """Return the CSV file to write, and what it holds already of other measurements.

    A directory has a file named after the machine, to which rows are added; a file is replaced.

    Raises:
        UserError: nothing can be written there, or the file for this machine is something else.
    """
    named = output.suffix == ".csv" and not output.is_dir()
    name = re.sub(r"[^\w.]+", "-", f"{machine.name}-{machine.threads}t-{precision}") + ".csv"
    file = output if named else output / name
    there = next(parent for parent in file.absolute().parents if parent.exists())
    if not there.is_dir():
        raise UserError(f"--output {output}: {there} is a file, expected a directory")
    if file.is_dir() or not os.access(file if file.exists() else there, os.W_OK):
        raise UserError(f"--output {output}: {file} cannot be written")
    return file, None if named or not file.exists() else _read(file)


def _read(file: Path) -> pd.DataFrame:
    try:
        earlier = pd.read_csv(file, dtype=str, keep_default_na=False)
    except ValueError:  # pandas' own errors are among them
        earlier = pd.DataFrame()
    if not set(_SUBJECT) <= set(earlier.columns):
        raise UserError(f"{file}: not a table of `effvit choose`, to which rows could be added; move it away")
    return earlier


def add_rows(file: Path, earlier: pd.DataFrame | None, table: pd.DataFrame) -> None:
    """Write a table of one model, with earlier rows of other models or batch sizes before it, as they were."""
    written = pd.read_csv(io.StringIO(table.to_csv(index=False)), dtype=str, keep_default_na=False)
    if earlier is not None:
        measured = {tuple(row) for row in written[_SUBJECT].itertuples(index=False)}
        others = [tuple(row) not in measured for row in earlier[_SUBJECT].itertuples(index=False)]
        written = pd.concat([earlier[others], written])[list(written.columns)].fillna("")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_csv(file, written)
