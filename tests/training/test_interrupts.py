import os
import signal
import threading

import pytest

from effvit.training.interrupts import noted_interrupts


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_first_signal_is_noted_and_handlers_are_put_back(number, status):
    before = signal.getsignal(number)
    with noted_interrupts() as request:
        assert request.number is None
        os.kill(os.getpid(), number)
        assert request.number == number and request.status == status
    assert signal.getsignal(number) is before


def test_second_interrupt_has_its_usual_effect():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), noted_interrupts():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with noted_interrupts() as request:
            os.kill(os.getpid(), signal.SIGTERM)
        assert request.number is None
    finally:
        signal.signal(signal.SIGTERM, before)


def test_another_thread_may_use_it():
    done = []

    def work():
        with noted_interrupts() as request:
            done.append(request.number)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [None]
