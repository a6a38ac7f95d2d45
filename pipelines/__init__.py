"""Ray Data pipelines: sources and partitions in, partitions processed by a pool of actors."""

import os

# Read by Ray when it is imported, so set here, before any module of this package imports it.
os.environ.setdefault("RAY_DATA_USE_DATASOURCE_V2", "0")  # V2 reading takes 12 s the first time
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its C++ core prints a harmless error for every actor
