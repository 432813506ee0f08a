"""The ``effvit`` command: one module a command, put together in ``app``."""
