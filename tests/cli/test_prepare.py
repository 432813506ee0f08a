import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from effvit.data.loading.prepared import PreparedDataset
from effvit.data.preparing import prepare
from effvit.data.sources import available_datasets
from effvit.errors import UserError

pytestmark = pytest.mark.slow

RUN = """
import sys, typer
from effvit.errors import one_line_errors
from effvit.cli.prepare import prepare
app = typer.Typer(pretty_exceptions_enable=False)
app.command()(prepare)
with one_line_errors():
    app()
"""
LIMITED = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n" + RUN
SHARED = Path(os.environ.get("EFFVIT_SHARED", Path(__file__).parents[2] / ".." / "shared"))


def run(*arguments, script=RUN, cwd=None):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def assert_one_line_error(result, *parts):
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.returncode == 1 and len(errors) == 1 and "Traceback" not in result.stderr
    for part in parts:
        assert part in errors[0]


def make_tree(root, per_class=10, side=32):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for index in range(per_class):
                pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index:04}.png")
    return root


def test_it_says_what_it_did(tmp_path):
    root = make_tree(tmp_path / "images")
    (root / "train" / ".DS_Store").touch()
    Image.new("L", (40, 32)).save(root / "test" / "cat" / "grey.png")
    result = run("--dataset", "folder", "--root", root, "--output-dir", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    for part in (
        "2 classes, 32x32 RGB",
        "18 train, 2 validation, 21 test",
        "train: 1 stray files ignored",
        "test: 1 grayscale converted to RGB",
        "test: 1 resized",
    ):
        assert part in result.stdout
    assert str(tmp_path) not in (tmp_path / "out" / "meta.json").read_text()


def test_digits_twice_are_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        prepare("digits", None, 32, tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_digits_need_no_place_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFVIT_DATA", str(tmp_path))
    with pytest.raises(UserError, match="name another output"):
        prepare("cifar10", None, 32, tmp_path / "cifar10")
    prepare("digits", None, 8, tmp_path / "digits")


def test_unknown_dataset_is_answered_with_the_known_ones(tmp_path):
    result = run("--dataset", "mnist", "--output-dir", tmp_path / "out")
    assert_one_line_error(result, "mnist", *available_datasets())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, -32, 7, 100000, "16"])
def test_image_size_out_of_range_is_refused(tmp_path, size):
    with pytest.raises(UserError, match=f"image_size={size!r}: expected 8 to 1024 pixels"):
        prepare("digits", None, size, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_tree_without_its_root_is_asked_for(effvit, tmp_path, monkeypatch):
    monkeypatch.setenv("EFFVIT_DATA", str(tmp_path / "data"))
    outcome = effvit("prepare", "--dataset", "folder", "--output-dir", tmp_path / "out")
    assert outcome.code == 1 and outcome.err.startswith("error: --root: missing; expected the folder with train/")
    with pytest.raises(UserError, match=r"^root: missing"):
        prepare("folder", None, 16, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    result = run("--dataset", "digits", "--output-dir", tmp_path)
    assert_one_line_error(result, str(tmp_path), "holds something else")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_images_are_not_replaced_by_what_is_prepared_of_them(tmp_path):
    root = make_tree(tmp_path / "images")
    (root / "meta.json").write_text('{"license": "mine"}')
    prepare("folder", root, 16, tmp_path / "out")
    shutil.copytree(root, tmp_path / "out" / "raw")
    lists = tmp_path / "listed"
    prepare("folder", root, 16, lists)
    (lists / "list.npy").write_text("cat\ndog\n")
    before = sorted(tmp_path.rglob("*"))
    for options, says in (
        (["--root", root, "--output-dir", root], "with it; name another output"),
        (["--root", root / "train", "--output-dir", root], "with it; name another output"),
        (["--root", tmp_path / "out/raw", "--output-dir", tmp_path / "out"], "with it; name another output"),
        (["--root", root, "--output-dir", tmp_path / "out"], "holds something else (raw)"),
        (["--root", root, "--classes", lists / "list.npy", "--output-dir", lists], "with it; name another output"),
    ):
        assert_one_line_error(run("--dataset", "folder", "--image-size", 16, *options), says)
        assert sorted(tmp_path.rglob("*")) == before
    shutil.rmtree(tmp_path / "out" / "raw")
    (tmp_path / "out" / "meta.json").write_text("damaged")
    prepare("folder", root, 16, tmp_path / "out")
    assert PreparedDataset.load(tmp_path / "out").classes == ("cat", "dog")


@pytest.mark.parametrize("splits", [["train"], ["train", "test"]])
def test_bad_image_ends_in_one_line_and_leaves_no_more_than_what_was_finished(tmp_path, splits):
    root = make_tree(tmp_path / "images")
    for split in splits:
        (root / split / "dog" / "9999.jpg").write_bytes(b"\xff\xd8\xff\xe0 no jpeg")
    result = run("--dataset", "folder", "--root", root, "--output-dir", tmp_path / "out")
    assert_one_line_error(result, "9999.jpg", "--skip-damaged", str(tmp_path / ".out.partial" / "damaged.csv"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "images"]
    skipping = ("--dataset", "folder", "--root", root, "--output-dir", tmp_path / "out", "--skip-damaged")
    result = run(*skipping)
    assert result.returncode == 0 and "train: 1 damaged images left out, see damaged.csv" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "out"]
    assert (tmp_path / "out" / "damaged.csv").read_text().count("9999.jpg") == len(splits)
    assert run(*skipping).returncode == 0  # it knows its own


TOO_MUCH = pytest.mark.parametrize(("size", "side", "per_class"), [(64, 8, 60), (144, 150, 45)])  # pixels and JPEG


@TOO_MUCH
def test_write_that_fails_half_way_leaves_nothing(tmp_path, size, side, per_class):
    root = make_tree(tmp_path / "images", per_class, side)
    arguments = ("--dataset", "folder", "--root", root, "--image-size", size, "--output-dir", tmp_path / "out")
    assert_one_line_error(run(*arguments, script=LIMITED), "File too large", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


@TOO_MUCH
def test_full_disk_ends_in_one_line_and_leaves_nothing(tmp_path, size, side, per_class):
    root, disk = make_tree(tmp_path / "images", per_class, side), tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=False)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs takes root")
    try:
        arguments = ("--dataset", "folder", "--root", root, "--image-size", size, "--output-dir", disk / "out")
        assert_one_line_error(run(*arguments), "No space left on device", "train_images")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_number_of_classes_that_differs_is_told_before_any_work(tmp_path):
    root = make_tree(tmp_path / "images")
    arguments = ("--dataset", "folder", "--root", root, "--num-classes", 3, "--output-dir", tmp_path / "out")
    assert_one_line_error(run(*arguments), "num_classes=3: folder has 2 classes there; set it to that")
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_options_for_ones_own_layout_reach_the_source_and_errors_name_them(effvit, tmp_path):
    root = make_tree(tmp_path / "images") / "train"
    options = ("prepare", "--dataset", "folder", "--root", root, "--output-dir", tmp_path / "out")
    outcome = effvit(*options)
    assert outcome.code == 1 and "add --test-share 0.2 to hold out a fifth" in outcome.err
    outcome = effvit(*options, "--test-share", 0.2)
    assert outcome.code == 0 and "16 train, 2 validation, 2 test" not in outcome.out
    assert "14 train, 2 validation, 4 test" in outcome.out
    assert "folder tree <class>, 20% of each class held out as test split by a fixed rule" in outcome.out
    assert effvit(*options, "--test-share", 0.9).err.startswith("error: --test-share 0.9: expected more than 0")
    assert effvit(*options, "--label-level", 0).err.startswith("error: --label-level 0: expected 1 for the top")


def test_choice_of_classes_is_refused_where_there_is_none(tmp_path):
    with pytest.raises(UserError, match="digits has its own; only imagenet100 and folder take a choice"):
        prepare("digits", None, 8, tmp_path / "out", classes=tmp_path / "list")


def test_real_cifar10_images_come_out_as_pillow_decodes_them(tmp_path):
    archive = SHARED / "data" / "cifar10-jpeg.tar.xz"
    if not archive.exists():
        pytest.skip(f"{archive} is not there (EFFVIT_SHARED names its folder)")
    with tarfile.open(archive) as tar:  # the archive starts with test; 3,000 members reach into several classes
        members = [member for _, member in zip(range(3000), tar, strict=False) if member.isfile()][::20]
        tar.extractall(tmp_path / "raw", members=members, filter="data")
    for split in ("train", "test"):
        (tmp_path / "images" / split).parent.mkdir(exist_ok=True)
        (tmp_path / "images" / split).symlink_to(tmp_path / "raw" / "test")
    result = run("--dataset", "folder", "--root", tmp_path / "images", "--output-dir", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    files = sorted((tmp_path / "raw" / "test").glob("*/*"))
    images, labels = PreparedDataset.load(tmp_path / "out").split("test")
    classes = sorted({path.parent.name for path in files})
    assert len(files) == len(images) > 100
    for path, image, label in zip(files, images[:], labels, strict=True):
        assert classes[label] == path.parent.name
        assert np.array_equal(image, np.asarray(Image.open(path).convert("RGB")))
