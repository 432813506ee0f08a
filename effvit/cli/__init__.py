"""The ``effvit`` command: one module a command, put together in ``app``."""

import os

# Read when torch loads. GNU OpenMP's threads otherwise spin so long for one another that a second busy process slows
# the small models here tenfold.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
