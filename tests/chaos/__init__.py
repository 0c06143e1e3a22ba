"""Random clients and random kills against real engines, under a parent that respawns; planted defects that must show.

`make chaos` and `make control`; docs/reliability.md says what is asserted.
"""
