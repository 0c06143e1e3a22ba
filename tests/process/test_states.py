"""RPCs at random, several at a time, against a server with an engine: no reply but those of docs/reliability.md.

STATES_EXAMPLES says how many servers are lived through (each with up to STATES_STEPS steps); the runs of a change are
the same ones each time, unless STATES_SEED says otherwise.
"""

import functools
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar, cast

import grpc
import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from common.pb import backend_pb2 as pb
from common.pb import backend_pb2_grpc as pb_grpc
from tests.models.script import line
from tests.process.orchestrator import FREE_SECONDS, PROBE_SECONDS, Backend, connect, eventually
from tests.process.wire import ENDLESS, PARSERS, content, model_options, predict_options

EXAMPLES = int(os.environ.get("STATES_EXAMPLES", "2"))
STEPS = int(os.environ.get("STATES_STEPS", "12"))
SEED = os.environ.get("STATES_SEED")
# No RPC may need longer, whatever runs beside it: a few loads that wait for each other.
DEADLINE = 120.0

UNAVAILABLE, CANCELLED = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED
NOT_LOADED = (grpc.StatusCode.FAILED_PRECONDITION, "model not loaded")
F = TypeVar("F", bound=Callable[..., None])
# How long to wait until the next step: not at all, for the midst of a load, or until it is over.
PATIENCE = st.sampled_from([0.0, 4.0, math.inf, math.inf])
State = pb.StatusResponse.State
PLAIN = line("plain")


def step(**strategies: Any) -> Callable[[F], F]:
    """A rule whose use is told with the server's end."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def told(self: "Server", **given: Any) -> None:
            self.steps.append(" ".join([function.__name__, *map(str, given.values())]))
            function(self, **given)

        return cast("F", rule(**strategies)(told))  # type: ignore[no-untyped-call]  # `told` takes what it is given

    return decorate


class Server(RuleBasedStateMachine):
    """What is asked of one server process, and what is known of its model.

    `loaded` is None while a LoadModel or Free is on its way, or was when it was last looked at.
    """

    folder: Path
    broken: Path

    @initialize(with_model=st.booleans())
    def start(self, with_model: bool) -> None:
        self.pool = ThreadPoolExecutor(32)
        self.backend = Backend().__enter__()
        self.steps: list[str] = []
        self.backend.wait_for_health()
        self.loaded: bool | None = False
        self.changes: list[Future[None]] = []
        self.others: list[Future[None]] = []
        if with_model:
            self.load(max_len=4096, patience=math.inf)

    # What changes the state

    @step(max_len=st.sampled_from([4096, 512]), patience=PATIENCE)
    def load(self, max_len: int, patience: float) -> None:
        options = model_options(self.folder, *PARSERS, MaxModelLen=max_len)
        self._change(lambda stub: self._load(stub, options), patience)

    @step(patience=PATIENCE)
    def load_broken_weights(self, patience: float) -> None:
        options = model_options(self.broken, *PARSERS)
        self._change(lambda stub: self._load(stub, options, broken="safetensor"), patience)

    @step(patience=PATIENCE)
    def load_broken_options(self, patience: float) -> None:
        options = model_options(self.folder, "tool_praser:hermes")
        self._change(lambda stub: self._load(stub, options, broken="tool_praser"), patience)

    @step(seconds=st.sampled_from([0.0, 0.3, 3.0]), patience=PATIENCE)
    def load_and_cancel(self, seconds: float, patience: float) -> None:
        """As the orchestrator does when a user goes away."""

        def call(stub: pb_grpc.BackendStub) -> None:
            future = stub.LoadModel.future(model_options(self.folder, *PARSERS), timeout=DEADLINE)
            time.sleep(seconds)
            future.cancel()

        self._change(call, patience)

    @step(patience=PATIENCE)
    def free(self, patience: float) -> None:

        def call(stub: pb_grpc.BackendStub) -> None:
            assert stub.Free(pb.HealthMessage(), timeout=DEADLINE).success

        self._change(call, patience)

    @precondition(lambda self: not self._changing())
    @step()
    def free_in_time(self) -> None:
        assert self.backend.call("Free", pb.HealthMessage(), timeout=FREE_SECONDS).success
        self.loaded = False

    def _settle(self) -> None:
        """All that was asked has its answer; now the state is known."""
        for future in self.changes:
            future.result(DEADLINE + 5)
        self.changes = []

        def still() -> str | None:
            state = State.Name(self.backend.status().state)
            return state if state in ("READY", "UNINITIALIZED") else None

        # A load that its caller has given up ends a moment later.
        self.loaded = eventually(still, 10, "no load any more") == "READY"
        assert len(self.backend.engine_cores()) == int(self.loaded)

    # What asks

    @step()
    def predict(self) -> None:
        known = None if self._changing() else self.loaded
        try:
            reply = self.backend.call("Predict", predict_options(PLAIN), timeout=DEADLINE)
        except grpc.RpcError as error:
            self._check_refusal(error, known)
        else:
            assert known is not False
            assert reply.message.decode() == PLAIN.content

    @step()
    def stream(self) -> None:
        known = None if self._changing() else self.loaded
        try:
            assert content(self.backend.stream(predict_options(PLAIN), timeout=DEADLINE)) == PLAIN.content
        except grpc.RpcError as error:
            self._check_refusal(error, known)
        else:
            assert known is not False

    @step(chunks=st.sampled_from([0, 1, 20]))
    def stream_and_cancel(self, chunks: int) -> None:
        with self.backend.connection() as stub:
            call = stub.PredictStream(predict_options(line("long"), **ENDLESS), timeout=DEADLINE)
            try:
                for _ in range(chunks):
                    next(call)
                call.cancel()
            except grpc.RpcError as error:
                self._check_refusal(error, None if self._changing() else self.loaded)

    @step()
    def stream_in_background(self) -> None:
        """One that ends with the model, or with the server."""

        def call(stub: pb_grpc.BackendStub) -> None:
            stream = stub.PredictStream(predict_options(line("long"), IgnoreEOS=True, Tokens=400), timeout=DEADLINE)
            try:
                assert list(stream)[-1].tokens == 400
            except grpc.RpcError as error:
                self._check_refusal(error, None)

        self.others.append(self._submit(call))

    @step()
    def status(self) -> None:
        state = self.backend.status().state
        if not self._changing() and self.loaded is not None:
            assert state == (State.READY if self.loaded else State.UNINITIALIZED)
        else:
            assert state in (State.UNINITIALIZED, State.BUSY, State.READY)

    @invariant()
    def health(self) -> None:
        if hasattr(self, "backend"):
            reply = self.backend.call("Health", pb.HealthMessage(), timeout=PROBE_SECONDS)
            assert reply.message == b"OK"

    # The end, whatever is on its way

    def teardown(self) -> None:
        if not hasattr(self, "backend"):
            return
        print(f"{len(self.steps)} steps: {', '.join(self.steps)}")
        try:
            ended = self.backend.exit_status is None
            stop = self.backend.stop() if ended else None
            # They have their answers, allowed ones; a call that hangs would keep this waiting.
            for future in (*self.changes, *self.others):
                future.result(5)
            assert stop is not None, "the server ended by itself"
            assert (stop.status, stop.killed) == (0, False)
            assert self.backend.left() == []
        except BaseException as error:
            self.backend.__exit__(type(error), error, None)
            raise
        finally:
            self.pool.shutdown(cancel_futures=True)
        self.backend.__exit__(None, None, None)

    # Its parts

    def _changing(self) -> bool:
        return any(not future.done() for future in self.changes) or self.loaded is None

    def _change(self, call: Any, patience: float) -> None:
        self.loaded = None
        self.changes.append(self._submit(call))
        if patience == math.inf:
            self._settle()
        else:
            time.sleep(patience)

    def _submit(self, call: Any) -> "Future[None]":
        def work() -> None:
            with connect(self.backend.addr) as stub:
                call(stub)

        return self.pool.submit(work)

    def _load(self, stub: pb_grpc.BackendStub, options: pb.ModelOptions, broken: str = "") -> None:
        try:
            result = stub.LoadModel(options, timeout=DEADLINE)
        except grpc.RpcError as error:
            assert error.code() == UNAVAILABLE, error  # noqa: PT017  # one of two answers
            return
        assert result.success is not bool(broken) or "cancelled" in result.message, result
        assert result.success or "cancelled" in result.message or broken in result.message.lower(), result

    def _check_refusal(self, error: grpc.RpcError, loaded: bool | None) -> None:
        """`loaded`: whether there is a model, where that is known for the whole of the call."""
        found = (error.code(), error.details())
        assert loaded is not True, found
        assert found == NOT_LOADED or (loaded is None and error.code() in (UNAVAILABLE, CANCELLED)), found
        assert error.details() or error.code() is CANCELLED


@pytest.mark.timeout(60 + 120 * EXAMPLES)
def test_random_orders(scripted: Path, tmp_path: Path) -> None:
    (broken := tmp_path / "broken").mkdir()
    for file in scripted.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = broken / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    Server.folder, Server.broken = scripted, broken
    machine = Server if SEED is None else seed(int(SEED))(Server)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            derandomize=SEED is None,
            database=None,
            deadline=None,
            phases=[Phase.generate],  # shrinking would start a hundred servers
            suppress_health_check=list(HealthCheck),
        ),
    )
