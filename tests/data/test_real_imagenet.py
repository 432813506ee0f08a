"""ImageNet's own images: all layouts, both ways of storing, and training on what comes out."""

import json
import os
import re
import tarfile
from pathlib import Path

import pytest

from effvit import ViTConfig
from effvit.data.loading.prepared import PreparedDataset
from effvit.data.preparing import prepare
from effvit.training.loop import Epoch, Training
from effvit.training.recipe import TrainConfig

pytestmark = pytest.mark.slow

DATA = Path(os.environ.get("EFFVIT_SHARED", Path(__file__).parents[2] / ".." / "shared")) / "data"


def unpack(name, directory):
    archive = DATA / name
    if not archive.exists():
        pytest.skip(f"{archive} is not there (EFFVIT_SHARED names its folder)")
    with tarfile.open(archive) as tar:
        tar.extractall(directory, filter="data")
    return directory


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A hundred classes of 64 x 64 pixels: 20,000 images to train on, 5,000 to test on."""
    return unpack("tiny-imagenet-100.tar.xz", tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def prepared(tree, tmp_path_factory):
    directory = tmp_path_factory.mktemp("prepared") / "tree"
    prepare("imagenet100", tree, 64, directory)
    return directory


def as_kaggle(tree, root):
    wnids = sorted(path.name for path in (tree / "train").iterdir())
    for index, wnid in enumerate(wnids):
        for source, part in (("train", f"train.X{1 + index // 25}"), ("val", "val.X")):
            (root / part).mkdir(parents=True, exist_ok=True)
            (root / part / wnid).symlink_to(tree / source / wnid)
    (root / "Labels.json").write_text(json.dumps({wnid: wnid for wnid in wnids}))
    return root, None


def among_more_classes(tree, root):
    wnids = sorted(path.name for path in (tree / "train").iterdir())
    for part in ("train", "val"):
        (root / part).mkdir(parents=True)
        for name, source in [*zip(wnids, wnids, strict=True), ("n00000001", wnids[0]), ("n99999999", wnids[1])]:
            (root / part / name).symlink_to(tree / part / source)
    (root / "list.txt").write_text("\n".join(wnids))
    return root, root / "list.txt"


def losses(dataset, attention, patch_size, recipe):
    config = ViTConfig(
        image_size=dataset.image_size,
        patch_size=patch_size,
        num_classes=len(dataset.classes),
        attention=attention,
        initializer_range=0.1,
    )
    training = Training(config, dataset, recipe, seed=0, horizontal_flip=True)
    return [event.train_loss for event in training.run() if isinstance(event, Epoch)]


@pytest.mark.parametrize("layout", [as_kaggle, among_more_classes])
def test_another_layout_of_the_same_images_gives_the_same_bytes(tree, prepared, tmp_path, layout):
    root, classes = layout(tree, tmp_path / "images")
    prepare("imagenet100", root, 64, tmp_path / "out", classes=classes)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in prepared.iterdir()}
    for path in prepared.iterdir():
        ours, theirs = path.read_bytes(), (tmp_path / "out" / path.name).read_bytes()
        if path.suffix == ".csv":  # which has the names of files
            theirs = re.sub(rb"(train|val)\.X\d?/", rb"\1/", theirs)
        assert ours == theirs or path.name == "meta.json"
    ours, theirs = (json.loads((d / "meta.json").read_text()) for d in (prepared, tmp_path / "out"))
    assert ours.pop("source") != theirs.pop("source")
    assert ours == theirs


def test_what_was_converted_is_counted(prepared):
    meta = json.loads((prepared / "meta.json").read_text())
    assert meta["counts"] == {"train": 18_000, "validation": 2_000, "test": 5_000}
    assert meta["notes"]["train"]["grayscale converted to RGB"] == 277


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    """A hundred images of full size at 224 x 224 pixels, one of each class in every split."""
    images = unpack("imagenet100-fullres-100.tar", tmp_path_factory.mktemp("full") / "images")
    for path in list((images / "val").glob("*/*")):  # two of a class: one is held out
        for index in range(2):
            link = images / "train" / path.parent.name / f"{index}{path.suffix}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    prepare("imagenet100", images, 224, images.parent / "out")
    return images.parent / "out"


@pytest.mark.parametrize("attention", ["fused", "performer"])
def test_full_size_images_are_reduced_and_learnt_from(full_size, attention):
    dataset = PreparedDataset.load(full_size)
    assert (dataset.storage, dataset.counts) == ("jpeg", {"train": 100, "validation": 100, "test": 100})
    notes = json.loads((full_size / "meta.json").read_text())["notes"]
    assert notes["test"]["grayscale converted to RGB"] == 1
    recipe = TrainConfig(epochs=3, batch_size=20, lr=2e-3, min_crop_area=0.35, workers=1, device="cpu")
    first, *_, last = losses(dataset, attention, 16, recipe)
    assert last < first
