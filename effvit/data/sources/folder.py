"""Images of one's own, in any layout that is recognised."""

from pathlib import Path

from effvit.data.sources.base import Source, default_root
from effvit.data.sources.layout import BY_CONTENT, Choices, build_source, read_class_list
from effvit.data.sources.layouts.recognise import recognise


def folder(root: Path | None, image_size: int, choices: Choices = BY_CONTENT) -> Source:
    """What is at ``root``, by default `default_root`: a folder, an archive or a file.

    Raises:
        UserError: no layout was recognised, or something is wrong with it.
    """
    root = root or default_root("folder")
    wanted = read_class_list(choices.classes) if choices.classes else None
    return build_source(recognise(root, choices, image_size), root, choices, wanted)
