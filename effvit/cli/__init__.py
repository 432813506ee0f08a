"""The ``effvit`` command: one module a command, put together in ``app``."""

import os

# Read when torch loads. GNU OpenMP's threads otherwise spin so long for one another that a second busy process slows
# the small models here tenfold.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def main() -> None:
    """Entry point of the console script, which says what to install where the commands' own packages are missing."""
    from effvit.errors import one_line_errors

    with one_line_errors():
        from effvit.cli import app
    app.main()
