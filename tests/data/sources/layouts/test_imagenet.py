"""ImageNet-1k as it is given out: Kaggle's release, the official archives, and a val without folders."""

import io
import shutil
import tarfile

import image_sets as sets
import numpy as np
import pytest
from scipy.io import savemat

from effvit.data.preparing import prepare
from effvit.data.sources.folder import folder
from effvit.data.sources.imagenet100 import imagenet100
from effvit.data.sources.layout import Choices
from effvit.errors import UserError

WNIDS = ("n01440764", "n01443537", "n02085620")
MADE = sets.make_pictures(WNIDS, train=6, val=2)
# Names as in ImageNet: those of val do not show their class.
ORDER = np.random.default_rng(0).permutation(6)
PICTURES = {
    "train": MADE["train"],
    "val": [
        sets.Picture(picture.label, f"ILSVRC2012_val_{number + 1:08}.JPEG", picture.content)
        for picture, number in zip(MADE["val"], ORDER, strict=True)
    ],
}
PICTURES["val"].sort()
BY_NUMBER = sorted(PICTURES["val"], key=lambda picture: picture.name)
IDS = {"n01440764": 3, "n01443537": 1, "n02085620": 2}  # the devkit's numbers are in another order than the WNIDs


def flat_val(root):
    for picture in PICTURES["val"]:
        sets.write(root / picture.name, picture.content)


def solution(path):
    rows = [f"{p.name.partition('.')[0]},{p.label} 1 2 30 40 {p.label} 5 6 70 80" for p in reversed(BY_NUMBER)]
    sets.write(path, "\n".join(["ImageId,PredictionString", *rows]))


def devkit(root):
    truth = "".join(f"{IDS[picture.label]}\n" for picture in BY_NUMBER)
    sets.write(root / "data" / "ILSVRC2012_validation_ground_truth.txt", truth)
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    synsets = np.zeros((len(IDS), 1), dtype=kinds)
    for row, (wnid, number) in enumerate(sorted(IDS.items(), key=lambda pair: pair[1])):
        synsets[row, 0] = (number, wnid, f"{wnid} title", 0)
    savemat(root / "data" / "meta.mat", {"synsets": synsets})


def packed_devkit(root):
    devkit(root / "ILSVRC2012_devkit_t12")
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        tar.add(root / "ILSVRC2012_devkit_t12", "ILSVRC2012_devkit_t12")
    shutil.rmtree(root / "ILSVRC2012_devkit_t12")


def class_tar(label):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for picture in reversed(PICTURES["train"]):
            if picture.label == label:
                sets.add(tar, picture.name, picture.content)
    return buffer.getvalue()


def kaggle(root):
    inner = root / "ILSVRC" / "Data" / "CLS-LOC"
    sets.as_tree({"train": PICTURES["train"]}, inner)
    flat_val(inner / "val")
    sets.write(inner / "test" / "ILSVRC2012_test_00000001.JPEG", PICTURES["val"][0].content)
    solution(root / "LOC_val_solution.csv")
    sets.write(root / "LOC_sample_submission.csv", "ImageId,PredictionString\n")
    sets.write(root / "LOC_synset_mapping.txt", "".join(f"{wnid} title of {wnid}, synonym\n" for wnid in WNIDS))
    return root


def inside_kaggle(root):
    return kaggle(root) / "ILSVRC" / "Data" / "CLS-LOC"


def flat_with_csv(root):
    sets.as_tree({"train": PICTURES["train"]}, root)
    flat_val(root / "val")
    solution(root / "LOC_val_solution.csv")
    return root


def flat_with_devkit(root):
    sets.as_tree({"train": PICTURES["train"]}, root)
    flat_val(root / "val")
    devkit(root / "ILSVRC2012_devkit_t12")
    return root


def tar_per_class(root):
    for wnid in WNIDS:
        sets.write(root / "train" / f"{wnid}.tar", class_tar(wnid))
    flat_val(root / "val")
    packed_devkit(root)
    return root


def official(root):
    root.mkdir()
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as tar:
        for wnid in reversed(WNIDS):
            sets.add(tar, f"{wnid}.tar", class_tar(wnid))
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as tar:
        for picture in BY_NUMBER:
            sets.add(tar, picture.name, picture.content)
    packed_devkit(root)
    return root


def zipped(root):
    return root.parent / shutil.make_archive(str(root), "zip", kaggle(root))


LAYOUTS = (kaggle, inside_kaggle, flat_with_csv, flat_with_devkit, tar_per_class, official, zipped)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [8, 96])
@pytest.mark.slow
def test_every_release_gives_the_arrays_of_a_sorted_tree(tmp_path, layout, size):
    prepare("imagenet100", sets.as_tree(PICTURES, tmp_path / "tree"), size, tmp_path / "expected")
    root = layout(tmp_path / "x")
    for name in ("imagenet100", "folder"):
        prepare(name, root, size, tmp_path / "out")
        assert sets.arrays(tmp_path / "out") == sets.arrays(tmp_path / "expected")


def test_names_come_from_the_mapping(tmp_path):
    assert imagenet100(kaggle(tmp_path / "x"), 8).classes == tuple(f"title of {wnid}" for wnid in WNIDS)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda r: (r / "LOC_val_solution.csv").unlink(), r"val has 6 images without folders .*; put LOC_val_solution"),
        (lambda r: (r / "LOC_val_solution.csv").write_text("a,b\n"), "expected the columns ImageId and Prediction"),
        (lambda r: sets.write(r / "val/ILSVRC2012_val_00000009.JPEG", b""), "val_00000009.JPEG: no ground truth"),
    ],
)
def test_what_is_wrong_with_the_ground_truth_is_named(tmp_path, spoil, message):
    root = flat_with_csv(tmp_path / "a" / "b" / "c" / "x")
    spoil(root)
    with pytest.raises(UserError, match=message):
        folder(root, 8)


@pytest.mark.parametrize("name", ["meta.mat", "ILSVRC2012_validation_ground_truth.txt"])
def test_damaged_devkit_is_named(tmp_path, name):
    root = flat_with_devkit(tmp_path / "x")
    (root / "ILSVRC2012_devkit_t12" / "data" / name).write_bytes(b"\xff" * 200)
    with pytest.raises(UserError, match=r"ILSVRC2012_devkit_t12: damaged or not the devkit"):
        folder(root, 8)


def test_damaged_archive_of_a_class_is_named(tmp_path):
    root = official(tmp_path / "x")
    path = root / "ILSVRC2012_img_train.tar"
    content = bytearray(path.read_bytes())
    content[512 + 1024 + 10 : 512 + 1024 + 200] = b"x" * 190  # in the inner tar, past its first member's header
    path.write_bytes(content)
    with tarfile.open(path) as tar:
        assert tar.getnames() == [f"{wnid}.tar" for wnid in reversed(WNIDS)]
    with pytest.raises(UserError, match=r"ILSVRC2012_img_train\.tar: damaged or unsafe"):
        folder(root, 8)


def test_classes_of_val_that_train_does_not_have_are_left_out_only_when_that_is_said(tmp_path):
    root = flat_with_csv(tmp_path / "x")
    shutil.rmtree(root / "train" / WNIDS[1])
    with pytest.raises(
        UserError, match=f"train has no class '{WNIDS[1]}' of val; classes=FILE takes only those in a file"
    ):
        folder(root, 8)
    sets.write(tmp_path / "list", f"{WNIDS[0]}\n{WNIDS[2]}\n")
    source = folder(root, 8, Choices(tmp_path / "list"))
    content = [picture.content for picture in PICTURES["val"] if picture.label != WNIDS[1]]
    assert [source.test.images.read(row) for row in range(4)] == content and len(source.train.labels) == 12


def test_image_of_val_that_is_missing_is_named(tmp_path):
    root = flat_with_csv(tmp_path / "x")
    name = PICTURES["val"][2].name
    (root / "val" / name).unlink()
    with pytest.raises(
        UserError, match=rf"of the 6 images .* 1 are missing, the first is {name.partition('.')[0]}; fetch"
    ):
        folder(root, 8)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_of_images_are_below_the_root(tmp_path, layout):
    root = layout(tmp_path / "x")
    source = folder(root, 8)
    for lot in (source.train.images, source.test.images):
        path = root / lot.name(0)
        inside = next(part for part in (path, *path.parents) if part.exists())
        assert inside.is_file() and inside.is_relative_to(root)
