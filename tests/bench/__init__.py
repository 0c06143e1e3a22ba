"""Measurements, to be run by hand: `python -m tests.bench.NAME`. Ratios taken in one run hold on any machine."""
