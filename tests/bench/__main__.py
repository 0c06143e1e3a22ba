"""`make bench`, `make bench-quick`: this server beside what a user could take instead, in one run on one machine.

Each fleet of systems is loaded, then every cell is measured in rounds in which the systems take turns; those whose turn
it is not are stopped (SIGSTOP). Status 1 where a promise does not hold, see `tests.bench.figures.verdicts`.
"""

import argparse
import dataclasses
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from tests.bench import plan, report
from tests.bench.asks import Ask
from tests.bench.figures import Cell, Measured, Round, figures, verdicts
from tests.bench.systems import Player, System, SystemFailedError, running

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"
# What an engine takes to wake up.
_SETTLE_SECONDS = 0.2
_WARM_UP_TOKENS = 16
_WAKE_TOKENS = 4
_COORDINATES = [field.name for field in dataclasses.fields(Cell)]


def main() -> int:
    """Measure, write the report, judge; the exit status."""
    given = _arguments()
    cells = [cell for cell in (plan.QUICK if given.quick else plan.FULL) if _wanted(cell, given)]
    if not cells:
        print("bench: no cell of tests/bench/plan.py is like that", file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    measured: list[Measured] = []
    failed = False
    with Player() as player:
        for fleet in dict.fromkeys(cell.fleet for cell in cells):
            systems = [
                system
                for system in plan.systems(fleet, player)
                if (system.name in given.system if given.system else not system.on_demand)
            ]
            try:
                with running(systems):
                    for cell in (cell for cell in cells if cell.fleet == fleet):
                        failed |= not _add(cell, systems, given, measured)
            except SystemFailedError as error:  # which measures nothing more, but the next fleet is another's
                print(f"{fleet}: {error}", file=sys.stderr, flush=True)
                failed = True
    found = list(verdicts(measured))
    print(report.judgement(found))
    return 1 if failed or not all(verdict.holds for verdict in found) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few cells, in five minutes")
    parser.add_argument("--rounds", type=int, help="how often each system has its turn; as the plan has it by default")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of all machines' reports; cells of old runs stay")
    parser.add_argument("--dry", action="store_true", help="write no report")
    parser.add_argument("--system", action="append", help="only these systems, such as ours; may be repeated")
    for name in _COORDINATES:
        kind = str if name in ("fleet", "scenario") else int
        parser.add_argument(f"--{name}", type=kind, action="append", help="only cells with it; may be repeated")
    return parser.parse_args()


def _wanted(cell: Cell, given: argparse.Namespace) -> bool:
    return all(getattr(given, name) is None or getattr(cell, name) in getattr(given, name) for name in _COORDINATES)


def _add(cell: Cell, systems: Sequence[System], given: argparse.Namespace, measured: list[Measured]) -> bool:
    """Measure one more, and write the report with it: hours of work are not lost with the last. False where unfair."""
    try:
        measured.append(_measure(cell, systems, given.rounds or plan.rounds(cell)))
    except UnfairError as error:
        print(f"{cell}: {error}", file=sys.stderr, flush=True)
        return False
    print(report.table(measured[-1]), flush=True)
    if not given.dry:
        folder = report.write(given.folder, measured, list(verdicts(measured)))
        print(f"in {folder}", flush=True)
    return True


class UnfairError(Exception):
    """Fewer requests than asked ran at once, or a prompt or an answer is not as long as asked."""


def _measure(cell: Cell, systems: Sequence[System], rounds: int) -> Measured:
    found: dict[str, list[Round]] = defaultdict(list)
    contenders = list(plan.contenders(cell, systems))
    expected: dict[tuple[int, int], set[str]] = defaultdict(set)
    for number in range(-1, rounds):  # the first to warm up
        for name, system, stream in plan.in_order(max(number, 0), contenders):
            tokens = cell.tokens if number >= 0 else min(cell.tokens, _WARM_UP_TOKENS)
            figures_of, lengths, in_flight = _turn(cell, system, Ask(cell.scenario, plan.WORDS, tokens, stream))
            if number >= 0:
                if in_flight != cell.streams:
                    raise UnfairError(f"{in_flight} of {cell.streams} requests of {name} ran at once")
                found[name].append(figures_of)
                for length in lengths:
                    expected[length].add(name)
    if len(expected) != 1:
        raise UnfairError(f"tokens of prompts and answers are not the same everywhere: {dict(expected)}")
    return Measured(cell, found)


def _turn(cell: Cell, system: System, ask: Ask) -> tuple[Round, set[tuple[int, int]], int]:
    """Figures, the lengths of prompts and answers, and how many ran at once in the turn that had fewest."""
    times = plan.repeats(cell)
    connections = cell.connections or cell.streams
    system.resume()
    time.sleep(_SETTLE_SECONDS)
    try:
        system.play(dataclasses.replace(ask, tokens=min(ask.tokens, _WAKE_TOKENS)), 1, 1)
        with system.beside(ask, cell.idle):
            before = system.cpu()
            turns = [system.play(ask, cell.streams, connections) for _ in range(times)]
            cpu = system.cpu() - before
            memory = system.memory()
    except SystemFailedError as error:
        asked = f"{system.name}, {cell.streams} at once, {ask.tokens} tokens"
        raise SystemFailedError(f"{asked}: {error}\n{system.log()}") from error
    finally:
        system.pause()
    lengths = {system.tokens(ask, bytes.fromhex(last)) for turn in turns for last in turn.last}
    tokens = times * cell.streams * ask.tokens
    return figures(turns, cpu, memory, tokens), lengths, min(turn.in_flight for turn in turns)


if __name__ == "__main__":
    sys.exit(main())
