"""Which columns of a Parquet or Arrow file hold images and labels, by its schema and Hugging Face's metadata in it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effvit.data.sources.layout import Choices
from effvit.data.sources.names import find_column
from effvit.data.sources.reading import reading
from effvit.data.sources.rows import is_parquet, open_arrow
from effvit.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import pyarrow as pa

_LABELS = ("label", "labels", "fine_label", "class", "category", "target", "cls")


def read_schema(path: Path) -> "pa.Schema":
    """The schema of a Parquet or Arrow file; raises `UserError` where it is none."""
    import pyarrow.parquet as pq

    with reading(path, "not a whole Parquet or Arrow file"):
        schema = pq.read_schema(path) if is_parquet(path) else open_arrow(path).schema
        _ = schema.names  # which are decoded only now
    return schema


def choose_columns(path: Path, schema: "pa.Schema", choices: Choices) -> tuple[str, str]:
    """The columns of images and of labels.

    Raises:
        UserError: a column that was named is not there or holds something else; none or several may be the one.
    """
    images, labels = (
        [_named(option, name, path, schema)] if name is not None else None
        for option, name in (("image_column", choices.image_column), ("label_column", choices.label_column))
    )
    columns = f"its columns are {', '.join(schema.names)}"
    images = images or image_columns(schema)
    if len(images) > 1:
        raise UserError(
            f"{path}: has several columns with images ({', '.join(images)}); {columns}; image_column=NAME takes one"
        )
    kind = schema.field(images[0]).type
    if not holds_images(kind):
        raise UserError(
            f"image_column={images[0]}: in {path} it is {kind}, expected encoded images; name another as image_column"
        )
    labels = labels or _label_columns(schema, images[0])
    if len(labels) != 1:
        found = f"several columns that may be labels ({', '.join(labels)})" if labels else "no column of labels"
        raise UserError(f"{path}: has {found}; {columns}; label_column=NAME takes one")
    kind = schema.field(labels[0]).type
    if not may_be_label(kind):
        raise UserError(
            f"label_column={labels[0]}: in {path} it is {kind}, expected one class for each row, as number or text; "
            "name another as label_column"
        )
    return images[0], labels[0]


def _named(option: str, name: str, path: Path, schema: "pa.Schema") -> str:
    index = find_column(name, schema.names)
    if index is None:
        raise UserError(
            f"{option}={name}: {path} has the columns {', '.join(schema.names)}{did_you_mean(name, schema.names)}"
        )
    return str(schema.names[index])


def _features(schema: "pa.Schema") -> Mapping[str, Any]:
    """What Hugging Face's metadata say of each column."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def image_columns(schema: "pa.Schema") -> list[str]:
    """Columns that hold images: those that the metadata declare, else those of bytes."""
    features = _features(schema)
    declared = [name for name in schema.names if features.get(name, {}).get("_type") == "Image"]
    found = declared or [field.name for field in schema if holds_images(field.type)]
    usual = [name for name in found if name.lower() in ("image", "img")]
    return usual if len(usual) == 1 else found


def holds_images(kind: "pa.DataType") -> bool:
    """Whether a column of that type may hold encoded images."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _label_columns(schema: "pa.Schema", image: str) -> list[str]:
    import pyarrow as pa

    features = _features(schema)
    others = [name for name in schema.names if name != image]
    found = [name for name in others if features.get(name, {}).get("_type") == "ClassLabel"]
    found = found or [name for name in others if may_be_label(schema.field(name).type)]
    for usual in _LABELS:
        if usual in found:
            return [usual]
    return [name for name in found if not pa.types.is_boolean(schema.field(name).type)] or found


def may_be_label(kind: "pa.DataType") -> bool:
    """Whether a column of that type may hold one class per row."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return may_be_label(kind.value_type)
    tests = (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string, pa.types.is_boolean)
    return any(test(kind) for test in tests)


def class_names(schema: "pa.Schema", label: str) -> tuple[str, ...] | None:
    """What the numbers in a column of labels stand for; None where the schema does not say so."""
    feature = _features(schema).get(label, {})
    names = feature.get("names") if feature.get("_type") == "ClassLabel" else None
    return tuple(map(str, names)) if isinstance(names, list) else None
