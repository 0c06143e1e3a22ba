"""The registration HTTP of the orchestrator's frontend, as a node that runs no models of its own speaks it."""

import asyncio
import base64
import json
import re
import ssl
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Self
from urllib.parse import quote, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

TIMEOUT_SECONDS = 10.0
# Of a refusal, so much is quoted; a page of HTML would bury it.
_MOST_CHARACTERS = 300
# The same request may be taken later; a frontend that is starting has no such path yet.
_PASSING = (HTTPStatus.NOT_FOUND, HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS)


class FrontendError(Exception):
    """A request that the frontend did not answer as it should; the text says how.

    Attributes:
        status: of its answer; None where there was none.

    """

    def __init__(self, text: str, status: int | None = None) -> None:
        super().__init__(text)
        self.status = status

    @property
    def is_final(self) -> bool:
        """Whether the frontend will say the same next time: it refused, for the node's own fault."""
        return self.status is not None and 400 <= self.status < 500 and self.status not in _PASSING


def without_userinfo(text: str) -> str:
    """`text` with no user and no password in the URLs of it."""
    return re.sub(r"(?<=://)[^/?#\s]*@", "", text)


class Frontend:
    """A client of one frontend; a context manager.

    Args:
        url: without a slash at the end. The certificate behind https is checked against the system's authorities, or
            those in SSL_CERT_FILE; proxies are those of HTTPS_PROXY, HTTP_PROXY and NO_PROXY; ~/.netrc is not read.
            A user and a password in it are sent as `Authorization: Basic`, where there is no token.
        token: sent as `Authorization: Bearer`, and in the body of the registration; None: not at all.
        timeout: seconds for each request.

    All methods raise FrontendError.

    """

    def __init__(self, url: str, token: str | None, timeout: float = TIMEOUT_SECONDS) -> None:
        self._url = without_userinfo(url)
        self._token = token
        self._authorization = f"Bearer {token}" if token else _basic(url)
        self._proxy = _proxy(url)
        self._timeout = timeout

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            headers={"Authorization": self._authorization} if self._authorization else {},
            timeout=aiohttp.ClientTimeout(total=self._timeout),
            # A frontend that was started again has closed what was kept open.
            connector=aiohttp.TCPConnector(force_close=True, ssl=ssl.create_default_context()),
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._session.close()

    async def register(self, node: Mapping[str, Any]) -> str:
        """Make `node` known, or known again; returns its id."""
        body = {**node, "token": self._token} if self._token else dict(node)
        answer = await self._ask("POST", "/api/node/register", body)
        identifier = answer.get("id") if isinstance(answer, dict) else None
        if not isinstance(identifier, str) or not identifier:
            raise FrontendError("its answer to the registration has no id")
        return identifier

    async def heartbeat(self, node: str, facts: Mapping[str, Any]) -> None:
        """The node is there; `facts` is what has changed about it."""
        await self._ask("POST", _path(node, "heartbeat"), facts)

    async def drain(self, node: str) -> None:
        """Give the node nothing more to do."""
        await self._ask("POST", _path(node, "drain"))

    async def in_flight(self, node: str) -> int:
        """Requests that the node is still working on."""
        models = await self._ask("GET", _path(node, "models"))
        if not isinstance(models, list):
            return 0
        return sum(int(model.get("in_flight") or 0) for model in models if isinstance(model, dict))

    async def deregister(self, node: str) -> None:
        """The node goes; it may be registered again."""
        await self._ask("POST", _path(node, "deregister"))

    async def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        try:
            async with self._session.request(method, self._url + path, json=body, proxy=self._proxy) as response:
                text = await response.text(errors="replace")
                if not response.ok:
                    shown = " ".join(text.split())[:_MOST_CHARACTERS]
                    raise FrontendError(f"{response.status} {response.reason or ''}: {shown}", response.status)
        except TimeoutError as error:
            raise FrontendError(f"no answer within {self._timeout:g} s") from error
        # ValueError is what aiohttp makes of a header or a proxy that can't be used.
        except (aiohttp.ClientError, OSError, asyncio.IncompleteReadError, ValueError) as error:
            raise FrontendError(without_userinfo(f"{type(error).__name__}: {error}")) from error
        try:
            return json.loads(text)
        except ValueError:
            return None


def _path(node: str, what: str) -> str:
    return f"/api/node/{quote(node, safe='')}/{what}"


def _basic(url: str) -> str | None:
    parts = urlsplit(url)
    if parts.username is None:
        return None
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return f"Basic {base64.b64encode(pair.encode()).decode()}"


def _proxy(url: str) -> str | None:
    """The environment's for `url`; aiohttp's own look, `trust_env`, would take an Authorization from ~/.netrc too."""
    parts = urlsplit(url)
    if proxy_bypass(parts.hostname or ""):
        return None
    proxy = getproxies().get(parts.scheme)
    # As with `trust_env`; aiohttp speaks to a proxy itself without TLS.
    return None if proxy is None or proxy.startswith("https:") else proxy
