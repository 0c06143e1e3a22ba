"""Measurements beside what a user could take instead: `make bench`. Ratios taken in one run hold on any machine."""
