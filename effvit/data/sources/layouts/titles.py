"""What WNIDs are called, as files next to ImageNet's images have it."""

from effvit.data.sources.tree import Tree


def read_titles(tree: Tree, path: str) -> dict[str, str]:
    """Titles by WNID from a file with a WNID, a space or tab and a title per line; none where there is no such file."""
    if not tree.has(path):
        return {}
    pairs = (line.split(maxsplit=1) for line in tree.read_text(path).splitlines())
    return {pair[0]: pair[1].strip() for pair in pairs if len(pair) == 2}
