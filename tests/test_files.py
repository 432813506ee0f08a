import errno
import json
import math
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from effvit.errors import UserError
from effvit.files import check_apart, staged_dir, staged_file, write_csv, write_json


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=False, capture_output=True
    ).returncode:
        pytest.skip("mounting a small tmpfs takes root")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_directory_appears_only_when_whole_and_replaces_the_old_one(tmp_path):
    final = tmp_path / "out"
    for content in ("old", "new"):
        with staged_dir(final) as aside:
            (aside / content).write_text(content)
            assert not (final / content).exists()
        assert names(final) == [content]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_failure_leaves_the_old_directory_and_nothing_else(tmp_path, error):
    final = tmp_path / "out"
    final.mkdir()
    (final / "old").touch()
    with pytest.raises(error), staged_dir(final) as aside:
        (aside / "half").touch()
        raise error
    assert names(tmp_path) == ["out"] and names(final) == ["old"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failure_leaves_the_old_file_and_nothing_else(tmp_path, error):
    final = tmp_path / "out.png"
    final.write_text("old")
    with pytest.raises(error), staged_file(final) as aside:
        aside.write_text("half")
        raise error
    assert names(tmp_path) == ["out.png"] and final.read_text() == "old"


def test_file_or_link_in_the_place_of_a_directory_is_replaced_and_what_it_points_to_kept(tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "precious").touch()
    (tmp_path / "link").symlink_to(kept)
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        with staged_dir(tmp_path / name) as aside:
            (aside / "new").touch()
        assert (tmp_path / name).is_dir() and not (tmp_path / name).is_symlink()
    assert names(kept) == ["precious"]


def test_directory_has_the_permissions_of_any_other(tmp_path):
    (tmp_path / "usual").mkdir()
    with staged_dir(tmp_path / "staged"):
        pass
    assert (tmp_path / "staged").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("final", [".", "..", "sub/.."])
def test_current_directory_is_never_replaced(tmp_path, monkeypatch, final):
    (tmp_path / "here" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match="current directory"), staged_dir(Path(final)):
        pass
    assert (tmp_path / "here" / "sub").is_dir()


def test_json_that_could_not_be_read_elsewhere_is_refused_and_leaves_nothing(tmp_path):
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError):
            write_json(tmp_path / "x.json", {"value": value})
    assert names(tmp_path) == []


def test_json_and_csv_read_back_the_same(tmp_path):
    value = {"z": 1, "a": [0.1, 1e-300, None, "ä"]}
    write_json(tmp_path / "x.json", value)
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == value
    assert (tmp_path / "x.json").read_text(encoding="utf-8").index('"z"') < 10, "keys keep their order"
    frame = pd.DataFrame({"n": np.arange(100), "x": np.random.default_rng(0).standard_normal(100)})
    write_csv(tmp_path / "x.csv", frame)
    assert np.array_equal(np.loadtxt(tmp_path / "x.csv", delimiter=",", skiprows=1), frame.to_numpy())


def test_full_disk_names_the_file_and_leaves_the_old_one(small_disk):
    final = small_disk / "x.json"
    write_json(final, "old")
    with pytest.raises(OSError) as caught:
        write_json(final, "x" * 200_000)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(final)
    assert names(small_disk) == ["x.json"] and json.loads(final.read_text()) == "old"


def test_full_disk_leaves_the_old_directory(small_disk):
    final = small_disk / "out"
    final.mkdir()
    (final / "old").touch()
    with pytest.raises(OSError) as caught, staged_dir(final) as aside:
        (aside / "big").write_bytes(bytes(200_000))
    assert caught.value.errno == errno.ENOSPC and caught.value.filename is not None
    assert names(small_disk) == ["out"] and names(final) == ["old"]


@pytest.mark.skipif(os.name != "posix", reason="directories of POSIX")
def test_a_directory_that_does_not_reach_the_disk_leaves_the_old_one(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()

    def failing(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError) as caught, staged_dir(tmp_path / "out") as aside:
        (aside / "new").touch()
    assert caught.value.filename == str(tmp_path / "out")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["old"]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_directory_that_may_not_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as caught, staged_dir(tmp_path / "file" / "out"):
        pass
    assert "file" in str(caught.value)


def test_a_directory_in_the_place_of_a_file_is_what_the_error_names(tmp_path):
    (tmp_path / "out.png").mkdir()
    with pytest.raises(OSError) as failure, staged_file(tmp_path / "out.png") as aside:
        aside.write_bytes(b"whole")
    assert (failure.value.filename, failure.value.filename2) == (str(tmp_path / "out.png"), None)
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_a_directory_of_somebody_else_is_not_replaced(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "photo.jpg").touch()
    (tmp_path / "file").touch()
    for name in ("photos", "file"):
        with pytest.raises(UserError, match="holds something else"), staged_dir(tmp_path / name, ("result.json",)):
            pass
    assert names(tmp_path) == ["file", "photos"] and names(tmp_path / "photos") == ["photo.jpg"]


def test_a_link_in_the_place_of_results_is_not_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    with pytest.raises(UserError, match="out: is a link"), staged_dir(tmp_path / "out", ("result.json",)):
        pass
    assert (tmp_path / "out").is_symlink() and names(tmp_path) == ["disk", "out"]


@pytest.mark.parametrize("stranger", ["thesis.txt", "result.json.txt", "parts/result.json"])
def test_earlier_results_with_something_else_among_them_are_kept(tmp_path, stranger):
    for name in ("out/result.json", "out/table.csv", f"out/{stranger}"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("years of work")
    before = sorted((tmp_path / "out").rglob("*"))
    first = stranger.split("/")[0]
    with (
        pytest.raises(UserError, match=rf"holds something else \({first}\)"),
        staged_dir(tmp_path / "out", ("result.json", "*.csv")),
    ):
        pass
    assert sorted((tmp_path / "out").rglob("*")) == before and names(tmp_path) == ["out"]


@pytest.mark.parametrize("below", [".", "inside", "inside/deeper"])
def test_output_that_holds_an_input_is_refused(tmp_path, below):
    (tmp_path / below).mkdir(parents=True, exist_ok=True)
    with pytest.raises(UserError, match="name another output"):
        check_apart(tmp_path, tmp_path.parent, tmp_path / below)
    check_apart(tmp_path / "inside", tmp_path, tmp_path / "insider")


def test_earlier_results_and_empty_directories_are_replaced(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "result.json").touch()
    for name in ("empty", "earlier", "new"):
        with staged_dir(tmp_path / name, ("result.json", "result")) as aside:
            (aside / "result").touch()
        assert names(tmp_path / name) == ["result"]


def test_a_kill_while_one_is_replaced_leaves_nothing_half(tmp_path, monkeypatch):
    """Each step of the replacement is the last: the next run finds the old, the new or nothing in that place."""
    for last in range(3):
        final = tmp_path / f"{last}"
        with staged_dir(final, ("a", "*")) as aside:
            (aside / "a").touch()
            (aside / "b").touch()
        steps, rename, remove = [], Path.replace, shutil.rmtree

        def step(act, *args, steps=steps, last=last, **options):
            steps.append(act)
            if len(steps) > last:
                raise SystemExit  # nothing after it happens
            return act(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", lambda *args, step=step, rename=rename: step(rename, *args))
            patch.setattr(shutil, "rmtree", lambda *args, step=step, remove=remove, **o: step(remove, *args, **o))
            with pytest.raises(SystemExit), staged_dir(final, ("a", "*")) as aside:
                (aside / "a").touch()
        assert not final.exists() or names(final) in (["a", "b"], ["a"])
        with staged_dir(final, ("a", "*")) as aside:
            (aside / "a").touch()
        assert names(final) == ["a"] and not (tmp_path / f".{last}.replaced").exists()
