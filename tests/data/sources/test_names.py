"""What names of files, columns and classes say."""

import pytest

from effvit.data.sources.names import check_shards, class_order, classes_among, find_column, has_no_labels, part_of
from effvit.errors import UserError


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("train-00000-of-00002.parquet", "train"),
        ("Train", "train"),
        ("trainLabels.csv", "train"),
        ("valid", "validation"),
        ("data/validation/0.tar", "validation"),
        ("testing", "test"),
        ("trains", None),
        ("latest", None),
        ("value", None),
        ("HAM_part_1", None),
    ],
)
def test_part_is_a_word_of_its_own(name, part):
    assert part_of(name) == part


def test_shards_are_whole_whether_numbers_begin_with_0_or_1_and_whatever_hash_follows(tmp_path):
    whole = ["a-0-of-2-x.parquet", "a-1-of-2-y.parquet", "b-1-of-2.tar", "b-2-of-2.tar", "c.tar"]
    check_shards(whole, tmp_path)
    for shard in whole[:-1]:
        with pytest.raises(UserError, match="is missing, and 1 of its 2 parts are there"):
            check_shards([other for other in whole if other != shard], tmp_path)


def test_column_is_found_as_written_before_in_another_case_and_never_of_two():
    assert find_column("b", ["B", "b"]) == 1
    assert find_column("b", ["a", " B "]) == 1
    assert find_column("b", ["B", " b"]) is None


def test_missing_labels_are_no_classes_and_minus_one_is_one_only_next_to_one():
    assert classes_among([None, "", -1, 2]) == {2}
    assert classes_among([1, -1, None]) == {1, -1} and classes_among(["-1", "1"]) == {"-1", "1"}
    assert has_no_labels("test", [None, -1]) and has_no_labels("validation", [""])
    assert not has_no_labels("train", [-1]) and not has_no_labels("test", [-1, 0])


def test_numbers_are_sorted_by_value_and_after_names():
    names = ["10", "9", "-1", "\u00b2", "cat", "9" * 40]
    assert sorted(names, key=class_order) == ["9" * 40, "cat", "\u00b2", "-1", "9", "10"]
