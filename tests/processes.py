"""Processes that tests start: what one says while it runs, and in the message where it fails."""

import subprocess


def read_until(process: subprocess.Popen[str], wanted: str) -> str:
    """Line of a process's stderr that holds `wanted`; where none does, all that it said is in the failure."""
    said = []
    assert process.stderr
    for line in process.stderr:
        said.append(line)
        if wanted in line:
            return line
    raise AssertionError(f"it ended with {process.wait()} and never said {wanted!r}:\n{''.join(said)}")


def finished(*command: object, **options: object) -> subprocess.CompletedProcess[str]:
    """A process that ended with 0; where it did not, its code and all that it said are in the failure."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"it ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done
