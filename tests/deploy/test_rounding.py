import pytest

from effvit.deploy.rounding import rounded_up


@pytest.mark.parametrize(
    ("bound", "expected"),
    [(1.43e-6, "2e-06"), (2e-6, "2e-06"), (9.1e-6, "1e-05"), (9.99e-7, "1e-06"), (0.0, "0e+00"), (3.0, "3e+00")],
)
def test_a_bound_is_never_rounded_down(bound, expected):
    said = rounded_up(bound)
    assert said == expected and float(said) >= bound
