"""`make chaos`: a run of CHAOS_SECONDS (600), its report in .chaos/, status 1 where something was not as it must be."""

import os
import random
import sys

from tests.chaos import judge, report
from tests.chaos.run import play


def main() -> int:
    """Play, write the report, print it."""
    seconds = float(os.environ.get("CHAOS_SECONDS", "600"))
    seed = int(os.environ.get("CHAOS_SEED", random.randrange(10**6)))
    print(f"CHAOS_SEED={seed}, {seconds:.0f} s", flush=True)
    outcome = play(seed, seconds, kills=os.environ.get("CHAOS_KILLS", "on") != "off")
    found = judge.problems(outcome)
    path = report.write(outcome, found)
    print(path.read_text(encoding="utf-8"))
    print(f"in {path}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
