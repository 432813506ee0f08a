"""Preparing files: parallel, interrupted, resumed."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from effvit.data.loading.prepared import PreparedDataset
from effvit.data.preparing import parts, prepare, shards, units
from effvit.errors import UserError

pytestmark = pytest.mark.slow

PREPARE = "from effvit.cli.app import main; main()"
PER_CLASS = 60


def picture(index, side=12):
    """A JPEG recognised by its grey level, with grayscale and CMYK among them."""
    rng = np.random.default_rng(index)
    pixels = rng.integers(0, 20, (side, side + 4, 3)) + index % 230
    buffer = io.BytesIO()
    mode = {0: "L", 1: "CMYK"}.get(index % 20, "RGB")
    Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(buffer, "JPEG")
    return buffer.getvalue()


def make_tree(root, per_class, side=12):
    for split, count in (("train", per_class), ("test", per_class // 4)):
        for label, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                (root / split / name / f"{index:05}.jpg").write_bytes(picture(2 * index + label, side))
    return root


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(parts, "SHARD_ROWS", 25)
    monkeypatch.setattr(shards, "UNIT_ROWS", 8)


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path / "images", PER_CLASS)


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def written(monkeypatch):
    """Names of the shards that are written."""
    names = []
    write = shards.Shard.write

    def recorded(self, rows):
        names.append(self.record.stem)
        return write(self, rows)

    monkeypatch.setattr(shards.Shard, "write", recorded)
    return names


@pytest.mark.parametrize("size", [16, 96])
def test_prepared_files_are_the_images_in_order_and_the_statistics_are_theirs(tmp_path, tree, size):
    prepare("folder", tree, size, tmp_path / "out")
    dataset = PreparedDataset.load(tmp_path / "out")
    assert dataset.storage == ("pixels" if size == 16 else "jpeg")
    images, labels = dataset.split("test")
    expected = [2 * index + label for label in range(2) for index in range(PER_CLASS // 4)]
    for image, label, number in zip(images[:], labels, expected, strict=True):
        truth = np.asarray(Image.open(io.BytesIO(picture(number))).convert("RGB")).mean()
        assert label == number % 2 and abs(image.mean() - truth) < 4
    pixels = dataset.split("train")[0][:].reshape(-1, 3) / 255
    off = 1e-6 if size == 16 else 2e-3  # what compression adds to those that are encoded anew
    np.testing.assert_allclose(dataset.mean, pixels.mean(0), atol=off)
    np.testing.assert_allclose(dataset.std, pixels.std(0), atol=off)
    grey = sum((2 * index + label) % 20 == 0 for label in range(2) for index in range(PER_CLASS))
    assert dataset.notes["train"]["grayscale converted to RGB"] == grey
    assert dataset.notes["train"]["CMYK converted to RGB"] == grey


@pytest.mark.parametrize("size", [16, 96])
def test_number_of_workers_does_not_show_in_the_bytes(tmp_path, tree, size):
    for workers in (1, 2):
        prepare("folder", tree, size, tmp_path / f"{workers}", workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("size", [16, 96])
def test_damaged_image_is_named_and_what_was_finished_is_kept_until_it_is_mended(
    tmp_path, tree, written, size, workers
):
    prepare("folder", tree, size, tmp_path / "whole")
    damaged = tree / "test" / "dog" / "00014.jpg"
    whole, when = damaged.read_bytes(), damaged.stat()
    damaged.write_bytes(whole[:-40])
    with pytest.raises(UserError, match=r"00014\.jpg: damaged image"):
        prepare("folder", tree, size, tmp_path / "out", workers=workers)
    assert not (tmp_path / "out").exists()
    damaged.write_bytes(whole)
    os.utime(damaged, ns=(when.st_atime_ns, when.st_mtime_ns))
    written.clear()
    prepare("folder", tree, size, tmp_path / "out")
    assert written == ["test-000000025"]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "out", "whole"]


@pytest.mark.parametrize(("size", "workers"), [(16, 1), (16, 2), (96, 1), (96, 2)])
def test_all_damaged_images_are_told_at_once_and_the_rest_is_not_read_again(tmp_path, tree, written, size, workers):
    prepare("folder", tree, size, tmp_path / "whole")
    damaged = [tree / "train" / "cat" / "00003.jpg", tree / "train" / "dog" / "00059.jpg"]
    damaged.append(tree / "test" / "cat" / "00000.jpg")
    originals = [path.read_bytes() for path in damaged]
    for path in damaged:
        path.write_bytes(b"\xff\xd8\xff\xe0 no jpeg")
    listed = tmp_path / ".out.partial" / "damaged.csv"
    with pytest.raises(UserError, match=rf"^3 images are damaged, listed in {re.escape(str(listed))} ") as caught:
        prepare("folder", tree, size, tmp_path / "out", workers=workers)
    assert all(f"{path}: " in str(caught.value) for path in damaged) and "\n" not in str(caught.value)
    names, reasons = zip(*csv.reader(listed.read_text().splitlines()), strict=True)
    assert list(names) == ["file", *(path.relative_to(tree).as_posix() for path in damaged)]
    assert reasons[0] == "reason" and all("image" in reason and str(tree) not in reason for reason in reasons[1:])
    assert not (tmp_path / "out").exists()
    for path, content in zip(damaged, originals, strict=True):
        path.write_bytes(content)
    written.clear()
    prepare("folder", tree, size, tmp_path / "out")
    assert written == ["train-000000000", "train-000000100", "test-000000000"]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_of_many_damaged_images_twenty_are_named_and_all_are_listed(tmp_path, tree):
    for path in (tree / "train" / "dog").iterdir():
        path.write_bytes(b"\xff\xd8\xff\xe0 no jpeg")
    with pytest.raises(UserError, match=r"^60 images are damaged, listed in .*; and 40 more$") as caught:
        prepare("folder", tree, 16, tmp_path / "out")
    assert str(caught.value).count("/dog/") == 20
    assert (tmp_path / ".out.partial" / "damaged.csv").read_text().count("/dog/") == 60


def damage(tree):
    """Spoil a whole shard of 25, the beginning and the end of others, and all that is held out of no class."""
    names = [f"train/cat/{index:05}.jpg" for index in [*range(25, 50), 50, 59]]
    names += ["train/dog/00000.jpg", "train/dog/00033.jpg", "test/cat/00000.jpg", "test/dog/00014.jpg"]
    for name in names:
        (tree / name).write_bytes(b"\xff\xd8\xff\xe0 no jpeg")
    return names


@pytest.mark.parametrize(("size", "workers"), [(16, 1), (16, 2), (96, 1), (96, 2)])
def test_skipped_images_are_left_out_with_their_labels_and_listed(tmp_path, tree, written, size, workers):
    prepare("folder", tree, size, tmp_path / "whole")
    names = damage(tree)
    prepare("folder", tree, size, tmp_path / "out", workers=workers, skip_damaged=True)
    whole, dataset = (PreparedDataset.load(tmp_path / name) for name in ("whole", "out"))
    for split in ("train", "validation", "test"):
        files = dict(zip(whole.files(split), range(len(whole.files(split))), strict=True))
        kept = [files[name] for name in dataset.files(split)]
        assert set(dataset.files(split)) == set(files) - set(names)
        assert np.array_equal(dataset.split(split)[1], whole.split(split)[1][kept])
        assert np.array_equal(dataset.split(split)[0][:], whole.split(split)[0][:][kept])
    note = "damaged images left out, see damaged.csv"
    assert dataset.notes["train"][note] == 29 and dataset.notes["test"][note] == 2 and note not in whole.notes["train"]
    table = csv.DictReader((tmp_path / "out" / "damaged.csv").read_text().splitlines())
    assert [row["file"] for row in table] == names
    pixels = dataset.split("train")[0][:].reshape(-1, 3) / 255
    np.testing.assert_allclose(dataset.mean, pixels.mean(0), atol=1e-6 if size == 16 else 2e-3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "out", "whole"]


@pytest.mark.parametrize("size", [16, 96])
def test_nothing_is_read_again_when_damaged_images_are_skipped_after_all(tmp_path, tree, written, size):
    damage(tree)
    prepare("folder", tree, size, tmp_path / "at once", skip_damaged=True)
    with pytest.raises(UserError, match="31 images are damaged"):
        prepare("folder", tree, size, tmp_path / "out")
    written.clear()
    prepare("folder", tree, size, tmp_path / "out", skip_damaged=True)
    assert written == []
    assert contents(tmp_path / "out") == contents(tmp_path / "at once")


def test_kill_while_gaps_are_closed_costs_time_and_no_image(tmp_path, tree, written, monkeypatch):
    damage(tree)
    prepare("folder", tree, 16, tmp_path / "whole", skip_damaged=True)
    moved, move = [], parts._move

    def killed(*arguments):
        moved.append(arguments)
        if len(moved) == 4:
            raise KeyboardInterrupt
        move(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(parts, "_move", killed)
        prepare("folder", tree, 16, tmp_path / "out", skip_damaged=True)
    written.clear()
    prepare("folder", tree, 16, tmp_path / "out", skip_damaged=True)
    assert written == [f"train-{first:09}" for first in (25, 50, 75, 100)]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        ("train/dog/*", "class 'dog': without the damaged images there is none to train on"),
        ("test/*/*", "test: there is no image without the damaged ones"),
        ("train/*/000[0-5]5.jpg", "validation: there is no image without the damaged ones"),
    ],
)
def test_class_or_split_of_damaged_images_alone_cannot_be_skipped(tmp_path, tree, spoilt, message):
    for path in tree.glob(spoilt):
        path.write_bytes(b"\xff\xd8\xff\xe0 no jpeg")
    with pytest.raises(UserError, match=message):
        prepare("folder", tree, 16, tmp_path / "out", skip_damaged=True)
    assert not (tmp_path / "out").exists()


def test_files_are_listed_in_the_order_of_the_images(tmp_path, tree):
    prepare("folder", tree, 16, tmp_path / "out")
    dataset = PreparedDataset.load(tmp_path / "out")
    for split in ("train", "validation", "test"):
        images, labels = dataset.split(split)
        for name, image, label in zip(dataset.files(split), images[:], labels, strict=True):
            assert name.split("/")[1] == dataset.classes[label]
            assert abs(image.mean() - np.asarray(Image.open(tree / name).convert("RGB")).mean()) < 4


def test_every_process_has_images_from_the_start(tmp_path):
    """Each of three processes waits for the two others before it reads its first unit of a part of 120 images."""
    script = "\n".join(
        [
            "import sys, time",
            "from pathlib import Path",
            "from effvit.data.preparing import prepare, shards, units",
            "if __name__ == '__main__':",
            "    shards.UNIT_ROWS = 8",
            "    prepare('folder', Path(sys.argv[1]), 96, Path(sys.argv[2]), workers=3)",
            "else:",
            "    read, here = units.Unit.read, Path(sys.argv[3])",
            "    def wait(self, on_image):",
            "        (here / str(self.first)).touch()",
            "        end = time.monotonic() + 60",
            "        while len(list(here.iterdir())) < 3:",
            "            assert time.monotonic() < end",
            "            time.sleep(0.01)",
            "        return read(self, on_image)",
            "    units.Unit.read = wait",
        ]
    )
    root = make_tree(tmp_path / "images", PER_CLASS)
    (tmp_path / "here").mkdir()
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, tmp_path / "script.py", root, tmp_path / "out", tmp_path / "here"]
    subprocess.run(command, check=True, capture_output=True)
    assert PreparedDataset.load(tmp_path / "out").counts == {"train": 108, "validation": 12, "test": 30}


def interrupt(tree, size, output, after):
    """Leave a preparation behind as a kill does, with ``after`` images read."""
    count = 0
    read = {name: getattr(units, name) for name in ("read_square", "read_jpeg")}

    def counting(name):
        def reader(*image):
            nonlocal count
            count += 1
            if count > after:
                raise KeyboardInterrupt
            return read[name](*image)

        return reader

    with pytest.MonkeyPatch.context() as patch:
        for name in read:
            patch.setattr(units, name, counting(name))
        with pytest.raises(KeyboardInterrupt):
            prepare("folder", tree, size, output)
    assert not output.exists()


@pytest.mark.parametrize("size", [16, 96])
def test_finished_shards_are_kept_but_not_those_whose_files_changed(tmp_path, tree, written, size):
    interrupt(tree, size, tmp_path / "out", after=80)
    (tree / "train" / "cat" / "00030.jpg").write_bytes(picture(7))  # in the second shard
    written.clear()
    prepare("folder", tree, size, tmp_path / "out")
    assert written[:3] == ["train-000000025", "train-000000075", "train-000000100"]
    prepare("folder", tree, size, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(("before", "size"), [(96, 128), (96, 16), (16, 96), (16, 24)])
def test_nothing_is_kept_for_other_settings(tmp_path, tree, written, before, size):
    interrupt(tree, before, tmp_path / "out", after=80)
    written.clear()
    prepare("folder", tree, size, tmp_path / "out")
    assert len(written) == 7
    prepare("folder", tree, size, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("size", [16, 96])
def test_removed_file_moves_the_rest_up(tmp_path, tree, written, size):
    interrupt(tree, size, tmp_path / "out", after=80)
    for index in range(30):
        (tree / "train" / "dog" / f"{index:05}.jpg").unlink()
    written.clear()
    prepare("folder", tree, size, tmp_path / "out")
    assert "train-000000000" not in written  # its files, and which of them are validation, are as before
    prepare("folder", tree, size, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_interrupt_before_the_first_shard_leaves_nothing(tmp_path, tree):
    interrupt(tree, 16, tmp_path / "out", after=20)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def processes_of(group):
    """Processes that are alive in a process group."""
    alive = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            alive.append(int(stat.parent.name))
    return alive


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not come about"
        time.sleep(0.01)


def test_killed_preparation_leaves_no_output_and_is_taken_up_where_it_was(tmp_path, monkeypatch):
    monkeypatch.undo()  # in processes of its own shards have their real size
    rows, size = shards.SHARD_ROWS, 96
    root = make_tree(tmp_path / "images", 3 * rows // 2, side=20)
    options = ["--dataset", "folder", "--root", root, "--image-size", size, "--workers", 2]
    command = [sys.executable, "-c", PREPARE, "prepare", *map(str, options), "--output-dir"]
    partial = tmp_path / ".out.partial"
    killed = subprocess.Popen([*command, tmp_path / "out"], start_new_session=True, stderr=subprocess.DEVNULL)
    wait_for(lambda: len(list(partial.glob("done/train-*.json"))) >= 1)  # not one that is still written aside
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    wait_for(lambda: not processes_of(killed.pid))  # its workers do not outlive it
    records = {path: path.stat().st_mtime_ns for path in partial.glob("done/train-*.json")}
    finished = [partial / "data" / f"train_images-{int(path.stem[6:]) // rows:05}.arrow" for path in records]
    before = {path.name: path.stat().st_ino for path in finished}

    again = subprocess.run([*command, tmp_path / "out"], capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert f"{len(records) * rows:,} images are there" in " ".join(again.stderr.split())
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in before} == before  # the same files, not rewritten
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "out"]
    prepare("folder", root, size, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_killed_worker_is_told_and_what_was_finished_is_kept(tmp_path, tree, monkeypatch):
    script = "\n".join(
        [
            "import os, signal, sys",
            "from effvit.data.preparing import parts, prepare, shards, units, workers",
            "from effvit.errors import one_line_errors",
            "from pathlib import Path",
            "if __name__ == '__main__':",
            "    parts.SHARD_ROWS = 25",
            "    shards.UNIT_ROWS = 8",
            "    with one_line_errors():",
            "        prepare('folder', Path(sys.argv[1]), 16, Path(sys.argv[2]), workers=2)",
            "elif not os.path.exists(sys.argv[3]):",
            "    read = units.Unit.read",
            "    def fail(self, on_image):",
            "        if self.first == 108:",
            "            Path(sys.argv[3]).touch()",
            "            os.kill(os.getpid(), signal.SIGKILL)",
            "        return read(self, on_image)",
            "    units.Unit.read = fail",
        ]
    )
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, tmp_path / "script.py", tree, tmp_path / "out", tmp_path / "failed"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "error: a worker was killed" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists() and list(tmp_path.glob(".out.partial/done/train-*.json"))
    subprocess.run(command, check=True, capture_output=True)
    prepare("folder", tree, 16, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_two_preparations_do_not_share_an_output(tmp_path, tree):
    from filelock import FileLock

    (tmp_path / ".out.partial").mkdir()
    with FileLock(tmp_path / ".out.partial" / "lock"), pytest.raises(UserError, match="another `effvit prepare`"):
        prepare("folder", tree, 16, tmp_path / "out")


def test_folder_of_somebody_else_is_not_taken_for_an_unfinished_one(tmp_path, tree):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "mine").touch()
    with pytest.raises(UserError, match=r"\.out\.partial: holds something else"):
        prepare("folder", tree, 16, tmp_path / "out")
    assert [path.name for path in (tmp_path / ".out.partial").iterdir()] == ["mine"]


@pytest.mark.parametrize("spoil", [lambda text: text[:50], lambda text: "{}", lambda text: "[]"])
def test_record_that_is_not_whole_counts_as_none(tmp_path, tree, written, spoil):
    interrupt(tree, 16, tmp_path / "out", after=80)
    record = tmp_path / ".out.partial" / "done" / "train-000000000.json"
    record.write_text(spoil(json.dumps(json.loads(record.read_text()))))
    written.clear()
    prepare("folder", tree, 16, tmp_path / "out")
    assert written[0] == "train-000000000"


def test_shards_of_another_root_are_not_taken_though_names_sizes_and_times_agree(tmp_path):
    for name, level in (("a", 10), ("b", 200)):
        for split in ("train", "val"):
            for label in ("x", "y"):
                for index in range(3):
                    path = tmp_path / name / split / label / f"{index}.bmp"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.new("RGB", (8, 8), (level, 0, 0)).save(path)
                    os.utime(path, ns=(0, 0))
    broken = tmp_path / "a" / "val" / "x" / "0.bmp"
    broken.write_bytes(b"BM")
    with pytest.raises(UserError, match="damaged"):
        prepare("folder", tmp_path / "a", 8, tmp_path / "out")
    assert list(tmp_path.glob(".out.partial/done/train-*.json"))
    data = prepare("folder", tmp_path / "b", 8, tmp_path / "out")
    assert set(data.split("train")[0][:].ravel()) == {0, 200}


def test_output_among_the_originals_is_refused(tree):
    with pytest.raises(UserError, match=r"x/out: is in root=.*, and would pass for originals; name another output"):
        prepare("folder", tree, 8, tree / "x" / "out")


def test_class_without_a_test_image_is_counted(tmp_path):
    rows = ["id,label,split", *(f"{i},{'abc'[i % 3]},train" for i in range(9)), "9,a,test"]
    for number in range(10):
        path = tmp_path / "in" / "images" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number, 8))
    (tmp_path / "in" / "labels.csv").write_text("\n".join(rows))
    data = prepare("folder", tmp_path / "in", 8, tmp_path / "out")
    assert data.notes["test"]["classes without an image"] == 2 and "classes without an image" not in data.notes["train"]
