import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from effvit.study.jobs import devices, run_all


def python(code):
    return [sys.executable, "-c", textwrap.dedent(code)]


@pytest.mark.parametrize(
    ("count", "gpus", "cores", "expected"),
    [
        (1, [], 8, [{"OMP_NUM_THREADS": "8"}]),
        (2, [], 2, [{"OMP_NUM_THREADS": "1"}] * 2),
        (3, [], 2, [{"OMP_NUM_THREADS": "1"}] * 3),
        (3, ["0", "GPU-b"], 6, [{"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": gpu} for gpu in ("0", "GPU-b", "0")]),
    ],
)
def test_each_job_has_its_gpu_and_its_share_of_the_threads(count, gpus, cores, expected):
    assert devices(count, gpus, cores) == expected


def test_as_many_run_at_a_time_as_there_are_places_each_in_its_own(tmp_path):
    """Each notes who else is running when it starts; the first two wait for one another."""
    code = f"""
    import os, pathlib, time
    here = pathlib.Path({str(tmp_path)!r})
    mine = here / os.environ["NAME"]
    mine.touch()
    print(sorted(path.name for path in here.iterdir()))
    deadline = time.monotonic() + 60
    while not (here / "met").exists() and sum(1 for _ in here.iterdir()) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    (here / "met").touch()
    mine.unlink()
    """
    lines = []
    failed = run_all({f"job{n}": python(code) for n in range(5)}, [{"NAME": "one"}, {"NAME": "two"}], lines.append)
    assert failed == {}
    seen = [line.partition("] ")[2] for line in lines if line.startswith("[job")]
    assert len(seen) == 5 and "['one', 'two']" in {line.replace("'met', ", "") for line in seen}
    assert [line.split(":")[0] for line in lines if line.endswith("done")] == [
        f"{n} of 5 cells ended" for n in range(1, 6)
    ]


def test_a_job_that_fails_is_named_with_what_it_said_and_the_others_finish():
    lines = []
    commands = {"good": python("print('fine')"), "bad": python("print('what went wrong'); raise SystemExit(3)")}
    commands |= {"killed": python("import os; os.kill(os.getpid(), 9)"), "last": python("print('fine too')")}
    failed = run_all(commands, [{}], lines.append)
    assert failed == {"bad": (3, ["what went wrong"]), "killed": (-9, [])}
    assert "[good] fine" in lines and "[last] fine too" in lines
    assert lines[-1] == "4 of 4 cells ended, 2 failed: last done"


def test_ctrl_c_ends_all_that_run_and_starts_no_more(tmp_path):
    """What a job started is ended as well: the file of one that was not would grow."""
    child = "import pathlib, sys, time\nwhile True:\n  pathlib.Path(sys.argv[1]).touch(); time.sleep(0.05)"
    job = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}, sys.argv[1]])"
    code = f"""
    import sys
    from effvit.study.jobs import run_all
    jobs = {{str(n): [sys.executable, "-c", {job!r}, {str(tmp_path)!r} + f"/{{n}}"] for n in range(4)}}
    run_all(jobs, [{{}}, {{}}], print)
    """
    process = subprocess.Popen(python(code), stderr=subprocess.PIPE, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    deadline = time.monotonic() + 120
    while len(list(tmp_path.iterdir())) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) != 0 and b"KeyboardInterrupt" in process.stderr.read()
    before = {path.name: path.stat().st_mtime for path in tmp_path.iterdir()}
    time.sleep(0.3)
    assert {path.name: path.stat().st_mtime for path in tmp_path.iterdir()} == before and len(before) == 2
