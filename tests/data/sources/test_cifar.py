import hashlib
import io
import pickle
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from effvit.data.preparing import prepare
from effvit.data.sources.cifar import cifar10, cifar100
from effvit.errors import UserError

UNREACHABLE = "http://127.0.0.1:9/archive.tar.gz"


def md5(content):
    return hashlib.md5(content).hexdigest()


def make_batch(rng, key, num_classes, n):
    labels = rng.permutation(np.arange(n) % num_classes).tolist()
    return {"data": rng.integers(0, 256, (n, 3072), dtype=np.uint8), key: labels}


def pack(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def install(monkeypatch, root, kind, key, num_classes, extra=None):
    """Make a small archive in the real format, and have torchvision expect its checksums; return its batches."""
    rng = np.random.default_rng(0)
    names = [name for name, _ in (*kind.train_list, *kind.test_list)]
    batches = {name: make_batch(rng, key, num_classes, 2 * num_classes) for name in names}
    files = {name: pickle.dumps(batch, protocol=2) for name, batch in batches.items()}
    files[kind.meta["filename"]] = pickle.dumps({kind.meta["key"]: [f"class {i}" for i in range(num_classes)]})
    root.mkdir(exist_ok=True)
    pack(root / kind.filename, {f"{kind.base_folder}/{name}": data for name, data in files.items()} | (extra or {}))
    for attribute in ("train_list", "test_list"):
        patched = [[name, md5(files[name])] for name, _ in getattr(kind, attribute)]
        monkeypatch.setattr(kind, attribute, patched)
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(files[kind.meta["filename"]])})
    monkeypatch.setattr(kind, "tgz_md5", md5((root / kind.filename).read_bytes()))
    return batches


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for kind in (CIFAR10, CIFAR100):
        monkeypatch.setattr(kind, "url", UNREACHABLE)


@pytest.fixture
def root(tmp_path):
    return tmp_path / "root"


@pytest.mark.parametrize(
    ("kind", "read", "key", "num_classes"),
    [(CIFAR10, cifar10, "labels", 10), (CIFAR100, cifar100, "fine_labels", 100)],
)
def test_archive_is_read_pixel_by_pixel(monkeypatch, root, kind, read, key, num_classes):
    batches = install(monkeypatch, root, kind, key, num_classes)
    source = read(root, 32)
    assert source.classes == tuple(f"class {i}" for i in range(num_classes))
    for split, listed in ((source.train, kind.train_list), (source.test, kind.test_list)):
        flat = np.concatenate([batches[name]["data"] for name, _ in listed])
        images = list(split.images)
        assert len(images) == len(flat)
        for image, row in zip(images, flat, strict=True):  # three planes of 32 rows of 32 pixels
            assert all(np.array_equal(image[:, :, c].ravel(), row[1024 * c : 1024 * (c + 1)]) for c in range(3))
        assert split.labels.tolist() == [label for name, _ in listed for label in batches[name][key]]
    assert sorted(path.name for path in root.iterdir()) == sorted([kind.base_folder, kind.filename])


def test_extracted_batches_are_used_without_the_archive(monkeypatch, root):
    install(monkeypatch, root, CIFAR10, "labels", 10)
    first = cifar10(root, 32)
    (root / CIFAR10.filename).unlink()
    assert np.array_equal(list(cifar10(root, 32).train.images), list(first.train.images))


def test_damaged_batch_is_never_unpickled_but_extracted_anew(monkeypatch, root, tmp_path):
    install(monkeypatch, root, CIFAR10, "labels", 10)
    cifar10(root, 32)
    batch = root / CIFAR10.base_folder / "data_batch_1"
    whole = batch.read_bytes()
    batch.write_bytes(f"cos\nsystem\n(S'touch {tmp_path / 'owned'}'\ntR.".encode())
    cifar10(root, 32)
    assert batch.read_bytes() == whole and not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[:-100], lambda data: data[:-1] + bytes([data[-1] ^ 1])]
)
def test_archive_with_a_wrong_checksum_is_refused_by_name_and_not_opened(monkeypatch, root, damage):
    install(monkeypatch, root, CIFAR10, "labels", 10)
    archive = root / CIFAR10.filename
    archive.write_bytes(damage(archive.read_bytes()))
    with pytest.raises(UserError) as caught:
        cifar10(root, 32)
    message = str(caught.value)
    assert str(archive) in message and "delete it to download it again" in message
    assert md5(archive.read_bytes()) in message and CIFAR10.tgz_md5 in message
    assert [path.name for path in root.iterdir()] == [archive.name]


@pytest.mark.parametrize("name", ["../escaped", "cifar-10-batches-py/../../escaped"])
def test_archive_that_leads_out_of_its_folder_is_refused(monkeypatch, root, name):
    install(monkeypatch, root, CIFAR10, "labels", 10, extra={name: b"malicious"})
    with pytest.raises(UserError, match="refused to extract"):
        cifar10(root, 32)
    assert [path.name for path in root.iterdir()] == [CIFAR10.filename]
    assert [path.name for path in root.parent.iterdir()] == [root.name]


def test_archive_without_the_batches_is_refused(monkeypatch, root):
    install(monkeypatch, root, CIFAR10, "labels", 10)
    pack(root / CIFAR10.filename, {f"{CIFAR10.base_folder}/readme.html": b"nothing else"})
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5((root / CIFAR10.filename).read_bytes()))
    with pytest.raises(UserError, match="do not have torchvision's checksums"):
        cifar10(root, 32)
    assert [path.name for path in root.iterdir()] == [CIFAR10.filename]


def test_without_archive_and_network_the_message_tells_the_ways_out(root):
    with pytest.raises(UserError) as caught:
        cifar10(root, 32)
    for part in (UNREACHABLE, str(root / CIFAR10.filename), f"{root}/train/<class>/", f"{root}/test/<class>/"):
        assert part in str(caught.value)
    assert list(root.iterdir()) == []


@pytest.fixture
def server(tmp_path):
    """The address of a server of the files in tmp_path / "served"."""
    (tmp_path / "served").mkdir()
    handler = partial(QuietHandler, directory=str(tmp_path / "served"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        pass


@pytest.mark.parametrize(("name", "reason"), [("page", "corrupted"), ("absent", "404")])
def test_failed_download_tells_the_reason_and_leaves_nothing(monkeypatch, root, tmp_path, server, name, reason):
    (tmp_path / "served" / "page").write_bytes(b"an error page")
    monkeypatch.setattr(CIFAR10, "url", f"{server}/{name}")
    with pytest.raises(UserError, match=rf"could not download .*{reason}"):
        cifar10(root, 32)
    assert list(root.iterdir()) == []


def test_archive_is_downloaded_where_there_is_none(monkeypatch, root, tmp_path, server):
    install(monkeypatch, root, CIFAR10, "labels", 10)
    served = (root / CIFAR10.filename).rename(tmp_path / "served" / CIFAR10.filename)
    monkeypatch.setattr(CIFAR10, "url", f"{server}/{CIFAR10.filename}")
    assert len(list(cifar10(root, 32).train.images)) == 100
    assert (root / CIFAR10.filename).read_bytes() == served.read_bytes()


def test_default_root_is_below_effvit_data(monkeypatch, tmp_path):
    monkeypatch.setenv("EFFVIT_DATA", str(tmp_path))
    install(monkeypatch, tmp_path / "cifar10", CIFAR10, "labels", 10)
    prepared = prepare("cifar10", None, 32, tmp_path / "out")
    assert prepared.counts == {"train": 90, "validation": 10, "test": 20}
    assert str(tmp_path) not in (tmp_path / "out" / "meta.json").read_text()


def make_tree(root, num_classes):
    for part in ("train", "test"):
        for label in range(num_classes):
            folder = root / part / f"c{label}"
            folder.mkdir(parents=True)
            for index in range(2):
                Image.new("RGB", (32, 32), (label, index, part == "test")).save(folder / f"{index}.png")


def test_folders_of_another_data_set_next_to_the_batches_are_not_taken_for_cifar(monkeypatch, root):
    install(monkeypatch, root, CIFAR10, "labels", 10)
    make_tree(root, 3)
    assert cifar10(root, 32).description.startswith("torchvision CIFAR10")


def test_any_layout_with_ten_classes_is_taken(root):
    make_tree(root, 10)
    source = cifar10(root, 32)
    assert len(source.train.labels) == 20 and source.classes == tuple(f"c{label}" for label in range(10))


@pytest.mark.parametrize(("read", "expected"), [(cifar10, "CIFAR10 has 10"), (cifar100, "CIFAR100 has 100")])
def test_another_number_of_classes_is_refused(root, read, expected):
    make_tree(root, 3)
    with pytest.raises(UserError, match=f"root: has 3 classes .*, {expected}; prepare other images as .* folder"):
        read(root, 32)


@pytest.mark.parametrize("name", ["thesis.tex", "photos/1.png"])
def test_nothing_is_downloaded_into_a_folder_of_something_else(root, tmp_path, server, monkeypatch, name):
    monkeypatch.setattr(CIFAR10, "url", f"{server}/archive.tar.gz")
    (root / name).parent.mkdir(parents=True)
    (root / name).write_bytes(b"")
    with pytest.raises(UserError, match="to download CIFAR10, name an empty folder as root"):
        cifar10(root, 32)
    assert [path.name for path in root.iterdir()] == [name.partition("/")[0]]


def test_litter_does_not_stop_a_download(monkeypatch, root, tmp_path, server):
    install(monkeypatch, root, CIFAR10, "labels", 10)
    (root / CIFAR10.filename).rename(tmp_path / "served" / CIFAR10.filename)
    monkeypatch.setattr(CIFAR10, "url", f"{server}/{CIFAR10.filename}")
    (root / "lost+found").mkdir()
    assert len(list(cifar10(root, 32).train.images)) == 100
