"""`python -m tests.bench.frontends 1 2 3`: calls a second of what needs no engine, by the number of frontends.

TokenizeString does all that a Predict does before the engine: there what serves is the ceiling, and more of it shows.
"""

import statistics
import sys
import time

from tests.bench import client
from tests.bench.plan import WORDS
from tests.bench.systems import Player, seconds
from tests.models import ensure
from tests.process.orchestrator import Backend, free_port, name
from tests.process.wire import PARSERS, chat, model_options

CALLS = 6000
CONNECTIONS = 60
ROUNDS = 5
_SETTLE_SECONDS = 3.0


def main() -> None:
    """Print a line for each number of frontends."""
    body = chat(WORDS).SerializeToString().hex()
    with Player() as player:
        for count in sys.argv[1:] or ("1", "2", "3"):
            port = free_port()
            with Backend(addr=f"127.0.0.1:{port}", env={"BACKEND_FRONTENDS": count}) as backend:
                backend.wait_for_health()
                result = backend.load(model_options(ensure("scripted"), *PARSERS))
                if not result.success:
                    raise RuntimeError(result.message)
                time.sleep(_SETTLE_SECONDS)
                others = [process.pid for process in backend.children() if "frontend" in name(process)]
                job = client.Job("grpc", port, "/backend.Backend/TokenizeString", [body] * CALLS, CONNECTIONS)
                player.play(job)  # the first calls on a connection cost more
                rates, costs = [], []
                for _ in range(ROUNDS):
                    before, began = sum(map(seconds, (backend.pid, *others))), time.monotonic()
                    player.play(job)
                    rates.append(CALLS / (time.monotonic() - began))
                    costs.append((sum(map(seconds, (backend.pid, *others))) - before) / CALLS * 1e6)
                print(
                    f"{count} frontends: {statistics.median(rates):.0f} calls/s ({min(rates):.0f} to {max(rates):.0f}),"
                    f" serving CPU {statistics.median(costs):.0f} µs/call",
                    flush=True,
                )


if __name__ == "__main__":
    main()
