"""The same images written in many layouts, as each layout's own tools write them."""

import csv
import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image


class Picture(NamedTuple):
    """An encoded image, its class, and the name of its file."""

    label: str
    name: str
    content: bytes


Pictures = dict[str, list[Picture]]
"""Images by part: train, val, test; in the order of class and name."""


def make_pictures(classes=("ant", "bee", "cat"), side=8, **counts):
    """Random PNGs, so many per class and part."""
    rng = np.random.default_rng(0)
    pictures = {}
    for part, count in counts.items():
        pictures[part] = []
        for label in classes:
            for index in range(count):
                buffer = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(buffer, "PNG")
                pictures[part].append(Picture(label, f"{label}_{part}_{index:03}.png", buffer.getvalue()))
    return pictures


def classes_of(pictures):
    return sorted({picture.label for part in pictures.values() for picture in part})


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def as_tree(pictures: Pictures, root: Path, names=()) -> Path:
    """``<part>/<class>/<file>``."""
    called = dict(names)
    for part, found in pictures.items():
        for picture in found:
            write(root / called.get(part, part) / picture.label / picture.name, picture.content)
    return root


def as_zip(pictures: Pictures, root: Path, method=zipfile.ZIP_DEFLATED, top="") -> Path:
    root.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(root, "w", method) as archive:
        for part, found in pictures.items():
            for picture in found:
                archive.writestr(f"{top}{part}/{picture.label}/{picture.name}", picture.content)
    return root


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def as_tar(pictures: Pictures, root: Path, top="") -> Path:
    root.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(root, "w") as tar:
        for part, found in pictures.items():
            for picture in found:
                add(tar, f"{top}{part}/{picture.label}/{picture.name}", picture.content)
    return root


def features(**columns):
    return {b"huggingface": json.dumps({"info": {"features": columns}}).encode()}


def hub_table(found, classes, image="image", label="label"):
    """What ``datasets`` writes: structs of bytes and path, and labels with their names in the schema's metadata."""
    import pyarrow as pa

    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": picture.content, "path": picture.name} for picture in found], kind)
    labels = pa.array([classes.index(picture.label) for picture in found], pa.int64())
    metadata = features(**{image: {"_type": "Image"}, label: {"names": list(classes), "_type": "ClassLabel"}})
    return pa.table({image: images, label: labels}).replace_schema_metadata(metadata)


def as_parquet(pictures: Pictures, root: Path, shards=2, row_group=3, **columns) -> Path:
    """``data/<part>-00000-of-00002.parquet``, as on the Hub."""
    import pyarrow.parquet as pq

    (root / "data").mkdir(parents=True, exist_ok=True)
    classes = classes_of(pictures)
    for part, found in pictures.items():
        name = {"val": "validation"}.get(part, part)
        ends = np.linspace(0, len(found), shards + 1).astype(int)
        for number in range(shards):
            table = hub_table(found[ends[number] : ends[number + 1]], classes, **columns)
            path = root / "data" / f"{name}-{number:05}-of-{shards:05}.parquet"
            pq.write_table(table, path, row_group_size=row_group)
    return root


def as_saved_to_disk(pictures: Pictures, root: Path) -> Path:
    """``<part>/data-00000-of-00001.arrow`` with ``state.json``, as ``DatasetDict.save_to_disk`` writes it."""
    import pyarrow as pa

    classes = classes_of(pictures)
    write(root / "dataset_dict.json", json.dumps({"splits": list(pictures)}))
    for part, found in pictures.items():
        table = hub_table(found, classes)
        (root / part).mkdir()
        path = str(root / part / "data-00000-of-00001.arrow")
        with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, table.schema) as sink:
            sink.write_table(table, max_chunksize=4)
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": part}
        write(root / part / "state.json", json.dumps(state))
        write(root / part / "dataset_info.json", "{}")
    return root


def as_webdataset(pictures: Pictures, root: Path, per_shard=1000, suffix="cls", named=False) -> Path:
    """``<part>-000000.tar`` with an image and its label for each key."""
    root.mkdir(parents=True, exist_ok=True)
    classes = classes_of(pictures)
    for part, found in pictures.items():
        for number, start in enumerate(range(0, len(found), per_shard)):
            with tarfile.open(root / f"{part}-{number:06}.tar", "w") as tar:
                for index, picture in enumerate(found[start : start + per_shard], start=start):
                    label = picture.label if named else classes.index(picture.label)
                    content = json.dumps({"label": label}) if suffix == "json" else str(label)
                    add(tar, f"{index:08}.{Path(picture.name).suffix[1:].lower()}", picture.content)
                    add(tar, f"{index:08}.{suffix}", content.encode())
    return root


def as_tiny_imagenet(pictures: Pictures, root: Path) -> Path:
    """As Stanford's CS231n gives it out; the images of ``val`` are in the order of a shuffle."""
    for picture in pictures["train"]:
        write(root / "train" / picture.label / "images" / picture.name, picture.content)
        write(root / "train" / picture.label / f"{picture.label}_boxes.txt", "n_0.JPEG\t0\t0\t63\t63\n")
    lines = []
    for picture in sorted(pictures["val"], key=lambda picture: picture.content):
        write(root / "val" / "images" / picture.name, picture.content)
        lines.append(f"{picture.name}\t{picture.label}\t0\t32\t44\t62\n")
    write(root / "val" / "val_annotations.txt", "".join(lines))
    write(root / "test" / "images" / "test_0.JPEG", pictures["val"][0].content)
    write(root / "wnids.txt", "\n".join(classes_of(pictures)))
    write(root / "words.txt", "".join(f"{label}\t{label} title, synonym\n" for label in classes_of(pictures)))
    return root


def as_csv(pictures: Pictures, root: Path, header=("id", "label"), suffix=False) -> Path:
    """``train/<name>`` and ``trainLabels.csv``, as in Kaggle's competitions."""
    for part, found in pictures.items():
        rows = []
        for picture in found:
            write(root / part / picture.name, picture.content)
            rows.append((picture.name if suffix else Path(picture.name).stem, picture.label))
        with (root / f"{part}Labels.csv").open("w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
    return root


def arrays(directory: Path) -> dict[str, bytes]:
    """The files of a prepared data set that training reads."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix in (".npy", ".arrow")}
