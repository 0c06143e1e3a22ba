"""A node and its frontend, which forgets, fails, dawdles and is started again."""

import asyncio
import base64
import contextlib
import logging
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from backend.membership import ATTEMPTS, Membership
from backend.registration import Frontend, FrontendError, without_userinfo
from tests.certificates import Authority
from tests.frontend import StandInFrontend
from tests.process.orchestrator import free_port

NODE = {"name": "vllm-b", "node_type": "agent", "labels": {"node.role": "vllm-follower"}, "total_vram": 0}
TOKEN = "-".join("token")
QUICK = 0.001


@contextlib.asynccontextmanager
async def member(
    stand_in: StandInFrontend, timeout: float = 5.0, token: str | None = None
) -> AsyncIterator[Membership]:
    async with Frontend(stand_in.url, token, timeout) as frontend:
        yield Membership(frontend, lambda: NODE, lambda: {"available_ram": 7}, pause=QUICK)


@contextlib.asynccontextmanager
async def staying(membership: Membership, interval: float = QUICK) -> AsyncIterator[None]:
    task = asyncio.create_task(membership.stay(interval))
    try:
        yield
    finally:
        assert not task.done()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def failing(status: int, *, what: str, times: int) -> Any:
    left = [times]

    def fault(asked: str) -> web.Response | None:
        if asked != what or not left[0]:
            return None
        left[0] -= 1
        return web.Response(status=status, text="<html>\n no   </html>")

    return fault


async def test_a_node_s_life() -> None:
    async with StandInFrontend(token=TOKEN) as stand_in, member(stand_in, token=TOKEN) as membership:
        await membership.join()
        async with staying(membership):
            await stand_in.until("heartbeat", 3)
        stand_in.in_flight = [2, 0]
        stand_in.calls.clear()
        await membership.leave()
        # One more heartbeat may have been on its way.
        assert [call for call in stand_in.calls if call != "heartbeat"] == ["drain", "models", "models", "deregister"]
        assert stand_in.registrations == [{**NODE, "token": TOKEN}]
        assert stand_in.heartbeats[0] == {"available_ram": 7}


async def test_without_a_token_none_is_sent() -> None:
    async with StandInFrontend() as stand_in, member(stand_in) as membership:
        await membership.join()
        assert stand_in.registrations == [NODE]


@pytest.mark.parametrize("status", [404, 408, 429, 500, 502, 503])
async def test_registers_again_and_again(status: int) -> None:
    async with StandInFrontend() as stand_in, member(stand_in) as membership:
        stand_in.fault = failing(status, what="register", times=3)
        await membership.join()
        assert stand_in.calls == ["register"] * 4


async def test_pauses_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    async with StandInFrontend() as stand_in, Frontend(stand_in.url, None) as frontend:
        stand_in.fault = failing(500, what="register", times=99)
        membership = Membership(frontend, lambda: NODE, dict)
        with monkeypatch.context() as patch:
            patch.setattr("backend.membership.asyncio.sleep", sleep)
            with pytest.raises(FrontendError, match="500 Internal Server Error: <html> no </html>"):
                await membership.join()
        assert stand_in.calls == ["register"] * ATTEMPTS
        assert [each for each in pauses if each >= 2] == [2, 4, 8, 16, 30, 30, 30, 30, 30]
        await membership.leave()  # of nothing
        assert stand_in.calls == ["register"] * ATTEMPTS


@pytest.mark.parametrize("status", [400, 401, 403])
async def test_a_refusal_is_final(status: int) -> None:
    async with StandInFrontend() as stand_in, member(stand_in) as membership:
        stand_in.fault = failing(status, what="register", times=99)
        with pytest.raises(FrontendError, match=str(status)):
            await membership.join()
        assert stand_in.calls == ["register"]


async def test_a_wrong_token_is_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        async with StandInFrontend(token="another") as stand_in, member(stand_in, token=TOKEN) as membership:  # noqa: S106
            with pytest.raises(FrontendError, match="401") as error:
                await membership.join()
    assert TOKEN not in str(error.value) + caplog.text


@pytest.mark.parametrize("answer", ["", "[]", "{}", '{"id": 3}'])
async def test_an_answer_without_an_id(answer: str) -> None:
    async with StandInFrontend() as stand_in, member(stand_in) as membership:
        stand_in.fault = lambda _what: web.Response(status=201, text=answer)
        with pytest.raises(FrontendError, match="has no id"):
            await membership.join()


async def test_a_frontend_that_dawdles() -> None:
    async with StandInFrontend() as stand_in, member(stand_in, timeout=0.2) as membership:
        stand_in.delay = 5
        joining = asyncio.create_task(membership.join())
        await stand_in.until("register", 2)
        stand_in.delay = 0
        await joining


async def test_forgotten_it_registers_again() -> None:
    async with StandInFrontend() as stand_in, member(stand_in) as membership:
        await membership.join()
        async with staying(membership):
            await stand_in.until("heartbeat", 2)
            stand_in.nodes.clear()
            await stand_in.until("register", 2)
            heard = stand_in.calls.count("heartbeat")
            await stand_in.until("heartbeat", heard + 2)
        await membership.leave()
        assert list(stand_in.nodes) == ["id/2"]
        assert stand_in.calls[-1] == "deregister"


@pytest.mark.parametrize("status", [401, 500, 503])
async def test_registers_again_after_heartbeats_that_failed(status: int) -> None:
    async with StandInFrontend() as stand_in, member(stand_in) as membership:
        await membership.join()
        async with staying(membership):
            stand_in.fault = failing(status, what="heartbeat", times=1)
            await stand_in.until("register", 2)
            heard = stand_in.calls.count("heartbeat")
            await stand_in.until("heartbeat", heard + 2)


async def test_a_frontend_that_is_started_again() -> None:
    port = free_port()
    async with Frontend(f"http://127.0.0.1:{port}", None, 1.0) as frontend:
        membership = Membership(frontend, lambda: NODE, dict, pause=QUICK)
        async with StandInFrontend(port=port):
            await membership.join()
        async with staying(membership):
            await asyncio.sleep(0.1)
            async with StandInFrontend(port=port) as second:
                await second.until("register")
                await second.until("heartbeat", 2)
                assert second.calls[0] == "register"


async def test_leaving_a_frontend_that_is_gone(caplog: pytest.LogCaptureFixture) -> None:
    async with contextlib.AsyncExitStack() as stack:
        stand_in = await stack.enter_async_context(StandInFrontend())
        membership = await stack.enter_async_context(member(stand_in))
        await membership.join()
        await stand_in.__aexit__()
        await membership.leave()
    assert "not deregistered" in caplog.text


async def test_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = Authority("ours")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(*authority.issue("frontend").write(tmp_path, "frontend"))
    (tmp_path / "authority.pem").write_bytes(authority.cert)
    async with StandInFrontend(tls=tls) as stand_in:
        async with Frontend(stand_in.url, None) as frontend:
            with pytest.raises(FrontendError, match="certificate verify failed"):
                await frontend.register(NODE)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
        async with Frontend(stand_in.url, None) as frontend:
            assert await frontend.register(NODE) == "id/1"


async def test_a_token_beats_what_netrc_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login u password p\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    async with StandInFrontend() as stand_in:
        for token in (TOKEN, None):
            async with Frontend(stand_in.url, token) as frontend:
                await frontend.register(NODE)
        assert stand_in.authorizations == [f"Bearer {TOKEN}", None]


async def test_a_user_and_a_password_in_the_url() -> None:
    async with StandInFrontend() as stand_in:
        url = stand_in.url.replace("//", f"//u:{TOKEN}%40@")
        async with Frontend(url, None) as frontend:
            await frontend.register(NODE)
        assert stand_in.authorizations == [f"Basic {base64.b64encode(f'u:{TOKEN}@'.encode()).decode()}"]


async def test_the_environment_s_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_PROXY", raising=False)
    async with StandInFrontend() as stand_in:
        monkeypatch.setenv("http_proxy", stand_in.url)
        monkeypatch.setenv("no_proxy", "left.out.invalid")
        async with Frontend("http://frontend.invalid", None) as frontend:
            assert await frontend.register(NODE) == "id/1"
        async with Frontend("http://left.out.invalid", None) as frontend:
            with pytest.raises(FrontendError, match=r"left\.out\.invalid"):
                await frontend.register(NODE)


async def test_what_aiohttp_cannot_send() -> None:
    async with StandInFrontend() as stand_in, Frontend(stand_in.url, f"{TOKEN}\n") as frontend:
        with pytest.raises(FrontendError) as error:
            await frontend.register(NODE)
    assert TOKEN not in str(error.value)


def test_urls_are_shown_without_their_passwords() -> None:
    assert without_userinfo("POST https://u:p@host/a@b and http://host") == "POST https://host/a@b and http://host"
