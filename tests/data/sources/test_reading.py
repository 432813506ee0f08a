"""What readers raise on damaged files."""

import errno
from pathlib import Path

import pytest

from effvit.data.sources.reading import reading
from effvit.errors import UserError


@pytest.mark.parametrize(
    "error", [KeyError("x"), RecursionError("x"), OSError("x\ny"), OSError(errno.EINVAL, "x"), NotImplementedError("x")]
)
def test_whatever_a_reader_raises_is_one_line_with_the_file(error):
    with (
        pytest.raises(UserError, match=r"^a\.npz: damaged file \(.*x.*\); fetch or make it again$"),
        reading(Path("a.npz")),
    ):
        raise error


@pytest.mark.parametrize(
    "error", [MemoryError(), PermissionError(errno.EACCES, "x"), KeyboardInterrupt(), UserError("x")]
)
def test_what_is_not_the_fault_of_the_file_stays_as_it_is(error):
    with pytest.raises(type(error)) as caught, reading(Path("a.npz")):
        raise error
    assert caught.value is error
