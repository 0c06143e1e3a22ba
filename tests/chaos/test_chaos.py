"""The short form of `make chaos`; CHAOS_SECONDS: longer, CHAOS_SEED: the same again, CHAOS_KILLS=off: only a soak."""

import os
import random
from pathlib import Path

import pytest

from tests.chaos import judge, report
from tests.chaos.run import play

SECONDS = float(os.environ.get("CHAOS_SECONDS", "45"))
SEED = int(os.environ.get("CHAOS_SEED", random.randrange(10**6)))
KILLS = os.environ.get("CHAOS_KILLS", "on") != "off"


@pytest.mark.timeout(300 + SECONDS * 1.5)
def test_clients_and_kills(tmp_path: Path) -> None:
    outcome = play(SEED, SECONDS, kills=KILLS)
    found = judge.problems(outcome)
    print(report.write(outcome, found, tmp_path).read_text(encoding="utf-8"))
    assert not found, f"CHAOS_SEED={SEED}: " + "\n".join(found)
    # The run itself: normal clients were served, and what should be done was done.
    assert outcome.record.good > 0
    assert (outcome.kills > 0) is KILLS
