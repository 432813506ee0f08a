import errno
import io
import signal
import subprocess
import sys
from typing import Annotated

import pytest
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from effvit.errors import UserError, did_you_mean, explain, one_line_errors


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    k: int = 1


class Outer(BaseModel):
    inner: Inner
    a: int = 1
    b: int = 2

    @model_validator(mode="after")
    def _ordered(self):
        if self.a > self.b:
            raise ValueError(f"a={self.a}: must be at most b={self.b}")
        return self


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"inner": {"k": 1.5}}, "study.inner.k=1.5: input should be a valid integer"),
        ({"inner": {"m": 1}}, "study.inner.m: unknown option"),
        ({}, "study.inner: missing"),
        ({"inner": {}, "a": 3}, "study: a=3: must be at most b=2"),
    ],
)
def test_validation_error_is_told_in_one_line_with_the_key_as_one_writes_it(values, told):
    with pytest.raises(ValidationError) as caught:
        Outer(**values)
    assert explain(caught.value, "study") == told


class Study(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    outer: Outer
    cells: dict[str, Inner] = {}


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"outer": {"inner": {"kk": 1}}}, "outer.inner.kk: unknown option, expected one of k (did you mean k?)"),
        (
            {"outer": {"inner": {}}, "cell": 1},
            "cell: unknown option, expected one of outer, cells (did you mean cells?)",
        ),
        ({"outer": {"inner": {}}, "cells": {"a": {"x": 1}}}, "cells.a.x: unknown option, expected one of k"),
    ],
)
def test_an_unknown_key_is_answered_with_those_that_are_known_at_its_place(values, told):
    with pytest.raises(ValidationError) as caught:
        Study(**values)
    assert explain(caught.value, model=Study) == told


class NoOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")


def test_where_there_are_no_options_that_is_said():
    with pytest.raises(ValidationError) as caught:
        NoOptions(k=1)
    assert explain(caught.value, "attention.fused", NoOptions) == (
        "attention.fused.k: unknown option, there are no options"
    )


def test_a_close_name_is_proposed_and_a_far_one_not():
    assert did_you_mean("lineformer", ["fused", "linformer"]) == " (did you mean linformer?)"
    assert did_you_mean("flash", ["standard", "linformer"]) == ""


class Several(BaseModel):
    model_config = ConfigDict(strict=True)
    size: Annotated[int, Field(ge=1)] | Annotated[tuple[int, Annotated[int, Field(ge=1)]], Field(strict=False)]
    b: int = 1


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"size": 0}, "size=0: input should be greater than or equal to 1"),
        ({"size": (4, 0)}, "size.1=0: input should be greater than or equal to 1"),
        ({"size": "x"}, "size='x': input should be a valid integer"),
        (
            {"size": 0, "b": "y"},
            "size=0: input should be greater than or equal to 1; b='y': input should be a valid int",
        ),
    ],
)
def test_a_field_of_several_types_is_told_once_and_without_their_names(values, told):
    with pytest.raises(ValidationError) as caught:
        Several(**values)
    assert explain(caught.value).startswith(told) and explain(caught.value).count(";") == told.count(";")


def test_every_problem_is_told(capsys):
    with pytest.raises(ValidationError) as caught:
        Outer(inner={"k": "x", "m": 1})
    assert len(explain(caught.value).split("; ")) == 2


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("k=0:\n  too small"), "error: k=0: too small\n"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "x.png"),
            "error: x.png: No such file or directory\n",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "error: No space left on device (free some space and run again)\n",
        ),
    ],
)
def test_error_a_user_can_mend_ends_the_process_with_one_line(capsys, error, line):
    with pytest.raises(SystemExit) as end, one_line_errors():
        raise error
    assert end.value.code == 1
    assert capsys.readouterr().err == line


def test_name_that_is_no_text_is_told_with_escapes(monkeypatch):
    stderr = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    monkeypatch.setattr(sys, "stderr", stderr)
    with pytest.raises(SystemExit), one_line_errors():
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "no\udcff.jpg")
    stderr.flush()
    assert stderr.buffer.getvalue() == b"error: no\\udcff.jpg: No such file or directory\n"


@pytest.mark.parametrize("sizes", [(2**20, 2**20, 2**10), (2**40, 2**40)])
def test_memory_that_runs_out_is_told_in_one_line(capsys, sizes):
    with pytest.raises(SystemExit) as end, one_line_errors():
        torch.empty(sizes)
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith("error: out of memory")


def test_input_that_is_wrong_as_a_whole_is_not_shown():
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate_json(b"x" * 1000)
    assert "invalid json" in explain(caught.value).lower() and "xxx" not in explain(caught.value)


def test_long_value_is_cut():
    with pytest.raises(ValidationError) as caught:
        Outer(inner={"k": "x" * 1000})
    assert explain(caught.value).startswith("inner.k='xxx") and len(explain(caught.value)) < 200


def test_interrupt_ends_the_process_as_shells_expect(capsys):
    with pytest.raises(SystemExit) as end, one_line_errors():
        raise KeyboardInterrupt
    assert end.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), KeyError("a bug"), OSError("no errno: some library's own"), RuntimeError("a bug")]
)
def test_bugs_keep_their_traceback(error):
    with pytest.raises(type(error)) as caught, one_line_errors():
        raise error
    assert caught.value is error


def test_interrupt_during_the_exit_has_no_traceback():
    script = """
import atexit, os, signal
from effvit.errors import one_line_errors
atexit.register(os.kill, os.getpid(), signal.SIGINT)
with one_line_errors():
    pass
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGINT and not ended.stderr


def test_termination_leaves_nothing_half_written(tmp_path):
    script = f"""
import os, signal, time
from pathlib import Path
from effvit.errors import one_line_errors
from effvit.files import staged_dir
with one_line_errors(), staged_dir(Path({str(tmp_path / "out")!r})) as aside:
    (aside / "half").touch()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode == 143 and not ended.stderr
    assert list(tmp_path.iterdir()) == []
