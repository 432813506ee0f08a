"""README, docs, docstrings and the report keep to plain English: no phrase at which readers stopped."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "effvit").rglob("*.py")),
    *sorted((ROOT / "effvit").rglob("*.jinja")),
]
BANNED = {
    r"\bbesides?\b": "next to, compared with, in addition",
    r"\bforetold\b": "predicted",
    r"\bdear(er|est)?\b": "expensive",
    r"\b(is|are|was) told\b": "is reported",
    r"\bgo(es)? on\b": "resumes, continues",
    r"\bof (AMD|timm|Intel)'s\b": "of AMD, of timm",
    r"what is its own|of its own but|all that it was": "say it with a noun",
    r"\bthe least\b(?!-)": "the lowest, the minimum",
    r"\b(images?|bytes?|seconds?|m?s|M*MACs|[kKM]i?B) an? (image|step|second|epoch|block|batch|sample)\b": "per",
    r"\b(From|At) (how many|no|what) \w+ (on|tried|does)\b": "subject first",
    r"\brank nothing\b": "may be noise",
    r"\bparts that this ViT has not\b|\bof which this ViT has none; expected\b(?!.*`)": "layers this ViT lacks",
    r"\bvaries besides\b": "does not include seed-to-seed variation",
    r"\bknows? of the swap\b|\bdo not tell\b|\bdoes not tell\b": "does not record, does not show",
    r"\bas they are\b|\bas it stands\b": "as written",
    r"\bturns of chance\b": "at random",
}


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_no_phrase_is_one_that_readers_stumbled_over(file):
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)  # code, and messages as they are printed
    found = [
        f"{match[0]!r}: write {instead}"
        for phrase, instead in BANNED.items()
        for match in re.finditer(phrase, " ".join(text.split()))
    ]
    assert found == []
