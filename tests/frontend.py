"""A stand-in for the orchestrator's frontend: the registration HTTP, with the faults that one can have."""

import asyncio
import ssl
from collections.abc import Callable
from typing import Any, Self

from aiohttp import web

# Answers a request instead of the frontend; called with its verb.
Fault = Callable[[str], web.Response | None]


class StandInFrontend:
    """Listens on a free port of 127.0.0.1, or on `port`; a context manager.

    Attributes:
        calls: what was asked, in order: `register`, `heartbeat`, `drain`, `models`, `deregister`.
        authorizations: the header of each call.
        registrations, heartbeats: the bodies.
        nodes: names of the nodes by id; empty them, and it has forgotten all.
        in_flight: what `models` answers, one after the other; 0 behind the last.
        fault: answers in its stead where it returns something.
        delay: seconds before each answer.

    """

    def __init__(
        self, *, token: str | None = None, port: int = 0, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None
    ) -> None:
        self._token = token
        self._host, self._port, self._tls = host, port, tls
        self.calls: list[str] = []
        self.authorizations: list[str | None] = []
        self.registrations: list[dict[str, Any]] = []
        self.heartbeats: list[dict[str, Any]] = []
        self.nodes: dict[str, str] = {}
        self.in_flight: list[int] = []
        self.fault: Fault = lambda _what: None
        self.delay = 0.0

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_post("/api/node/register", self._register)
        app.router.add_post("/api/node/{id}/{what}", self._about)
        app.router.add_get("/api/node/{id}/{what}", self._about)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, self._host, self._port, ssl_context=self._tls).start()
        self._port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._runner.cleanup()

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._port

    @property
    def url(self) -> str:
        """As `--register-to` takes it."""
        return f"{'https' if self._tls else 'http'}://{self._host}:{self._port}"

    async def until(self, what: str, count: int = 1, seconds: float = 10.0) -> None:
        """Wait until `what` was asked `count` times."""
        async with asyncio.timeout(seconds):
            while self.calls.count(what) < count:  # noqa: ASYNC110  # a call is no event of this loop alone
                await asyncio.sleep(0.01)

    async def _register(self, request: web.Request) -> web.Response:
        body = await request.json()
        if (answer := await self._first("register", request)) is not None:
            return answer
        if self._token and body.get("token") != self._token:
            return web.json_response({"error": "invalid registration token"}, status=401)
        self.registrations.append(body)
        # One that is registered again keeps its row.
        known = next((node for node, name in self.nodes.items() if name == body["name"]), None)
        node = known or f"id/{len(self.registrations)}"
        self.nodes[node] = body["name"]
        return web.json_response({"id": node, "name": body["name"], "status": "pending"}, status=201)

    async def _about(self, request: web.Request) -> web.Response:
        what = request.match_info["what"]
        if (answer := await self._first(what, request)) is not None:
            return answer
        if request.match_info["id"] not in self.nodes:
            return web.json_response({"error": "node not found"}, status=404)
        if what == "heartbeat":
            self.heartbeats.append(await request.json())
        if what == "models":
            count = self.in_flight.pop(0) if self.in_flight else 0
            return web.json_response([{"model": "m", "in_flight": count}, {"model": "n"}])
        return web.json_response({})

    async def _first(self, what: str, request: web.Request) -> web.Response | None:
        self.calls.append(what)
        self.authorizations.append(request.headers.get("Authorization"))
        if self.delay:
            await asyncio.sleep(self.delay)
        if self._token and request.headers.get("Authorization") != f"Bearer {self._token}":
            return web.json_response({"error": "unauthorized"}, status=401)
        return self.fault(what)
