"""Named experiments, each runnable as `mlakit study NAME` and as `python -m mlakit.studies.NAME`."""
