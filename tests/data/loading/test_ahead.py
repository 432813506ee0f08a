import threading

import pytest

from effvit.data.loading.ahead import ahead

LONG = 60  # seconds, of which none pass unless a test fails


def helpers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_everything_comes_in_order_and_no_thread_stays(count):
    assert list(ahead(iter(range(count)))) == list(range(count))
    assert helpers() == []


def test_the_next_is_made_while_one_is_in_use_and_none_after_it():
    made, threads = [threading.Event() for _ in range(4)], []

    def items():
        for event in made:
            threads.append(threading.current_thread())
            event.set()
            yield event

    given = ahead(items())
    next(given)
    assert made[1].wait(LONG), "before it is asked for"
    assert not made[2].is_set(), "one at a time"
    next(given)
    assert made[2].wait(LONG) and not made[3].is_set()
    given.close()
    assert threads[0] is threading.current_thread() and threading.current_thread() not in threads[1:]


def test_an_error_comes_where_its_item_would():
    def items():
        yield 1
        yield 2
        raise ValueError("the third")

    given = ahead(items())
    assert [next(given), next(given)] == [1, 2]
    with pytest.raises(ValueError, match="the third"):
        next(given)
    assert helpers() == []


def test_who_stops_early_leaves_no_thread():
    given = ahead(iter(range(100)))
    assert next(given) == 0
    given.close()
    assert helpers() == []
