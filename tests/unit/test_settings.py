"""Flags, environment and defaults, and what is said about values that can't be used."""

import dataclasses
import re
from pathlib import Path

import pytest

from backend.flag_values import SettingsError
from backend.settings import LOG_FORMATS, LOG_LEVELS, Settings, TlsFiles, parse_settings
from backend.versions import versions
from common.admission import Limits

ADDR = ("--addr", "127.0.0.1:0")


@pytest.mark.parametrize(
    ("given", "addr"),
    [
        ("127.0.0.1:50051", "127.0.0.1:50051"),
        ("0.0.0.0:0", "0.0.0.0:0"),
        ("localhost:1", "localhost:1"),
        ("host.example.org:65535", "host.example.org:65535"),
        ("[::1]:50051", "[::1]:50051"),
        ("[fe80::1%eth0]:5", "[fe80::1%eth0]:5"),
        ("::1:50051", "[::1]:50051"),
        (":::0", "[::]:0"),
        ("127.0.0.1:00080", "127.0.0.1:80"),
        ("unix:/run/backend.sock", "unix:/run/backend.sock"),
        ("unix:relative.sock", "unix:relative.sock"),
        ("unix:///run/backend.sock", "unix:///run/backend.sock"),
    ],
)
def test_address(given: str, addr: str) -> None:
    assert parse_settings(["--addr", given], {}).addr == addr
    assert parse_settings([f"--addr={given}"], {}).addr == addr


@pytest.mark.parametrize(
    "given",
    [
        "",
        "50051",
        "localhost",
        ":50051",
        "localhost:",
        "localhost:http",
        "localhost:-1",
        "localhost:65536",
        pytest.param("localhost:" + "9" * 5000, id="long port"),
        "localhost:1.5",
        "localhost:\N{SUPERSCRIPT TWO}",
        "[::1]",
        "[::1:50051",
        "unix:",
        "unix://",
    ],
)
def test_an_address_that_cannot_be_used(given: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_settings(["--addr", given], {})
    assert str(caught.value).startswith("--addr")
    assert "path" in str(caught.value) if given.startswith("unix") else "HOST:PORT" in str(caught.value)


def test_an_address_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_settings([], {})
    assert caught.value.code == 2
    assert "--addr" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--nope"], ["--max-message", "5"], ["extra"]])
def test_unknown_flags_and_abbreviations_are_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_settings([*ADDR, *argv], {})
    assert caught.value.code == 2
    assert argv[0] in capsys.readouterr().err


def test_several_frontends_need_a_port() -> None:
    with pytest.raises(SettingsError) as caught:
        parse_settings(["--addr", "unix:/run/b.sock", "--frontends", "2"], {})
    assert str(caught.value) == "--frontends 2: needs HOST:PORT; several processes can't listen on unix:/run/b.sock"
    assert parse_settings(["--addr", "unix:/run/b.sock", "--frontends", "1"], {}).frontends == 1


def test_defaults() -> None:
    assert parse_settings(ADDR, {}) == Settings(
        addr="127.0.0.1:0", max_message_mib=50, log_level="info", shutdown_timeout=6.0, auth_token=None
    )


@pytest.mark.parametrize(
    ("flag", "variable", "field", "values"),
    [
        ("--max-message-mib", "BACKEND_MAX_MESSAGE_MIB", "max_message_mib", {"7": 7, "2047": 2047, "1": 1}),
        ("--frontends", "BACKEND_FRONTENDS", "frontends", {"1": 1, "2": 2, "64": 64}),
        ("--log-level", "BACKEND_LOG_LEVEL", "log_level", {"DEBUG": "debug", "Warning": "warning"}),
        ("--log-format", "BACKEND_LOG_FORMAT", "log_format", {"json": "json", "JSON": "json"}),
        (
            "--max-waiting-requests",
            "BACKEND_MAX_WAITING_REQUESTS",
            "limits",
            {"0": Limits(waiting=0), "7": Limits(waiting=7)},
        ),
        ("--max-running-requests", "BACKEND_MAX_RUNNING_REQUESTS", "limits", {"1": Limits(running=1)}),
        (
            "--max-waiting-tokens",
            "BACKEND_MAX_WAITING_TOKENS",
            "limits",
            {" 9 ": Limits(waiting_tokens=9), "1000000000": Limits(waiting_tokens=10**9)},
        ),
        ("--drain-seconds", "BACKEND_DRAIN_SECONDS", "drain_seconds", {"0": 0.0, "2.5": 2.5, "600": 600.0}),
        ("--shutdown-timeout", "BACKEND_SHUTDOWN_TIMEOUT", "shutdown_timeout", {"0": 0.0, "2.5": 2.5, "600": 600.0}),
    ],
)
def test_flag_before_environment_before_default(
    flag: str, variable: str, field: str, values: dict[str, object]
) -> None:
    default = getattr(parse_settings(ADDR, {}), field)
    for text, value in values.items():
        assert getattr(parse_settings([*ADDR, flag, text], {}), field) == value
        assert getattr(parse_settings([*ADDR, f"{flag}={text}"], {}), field) == value
        assert getattr(parse_settings(ADDR, {variable: text}), field) == value
        assert getattr(parse_settings([*ADDR, flag, text], {variable: "3"}), field) == value
        assert getattr(parse_settings(ADDR, {variable.lower(): text}), field) == default


@pytest.mark.parametrize(
    ("flag", "variable", "text", "allowed"),
    [
        ("--max-message-mib", "BACKEND_MAX_MESSAGE_MIB", text, "a whole number from 1 to 2047")
        for text in ("", "0", "-1", "+7", "1_0", "\N{ARABIC-INDIC DIGIT SEVEN}", "2048", "1.5", "many", "nan", "9" * 30)
    ]
    + [
        (f"--{name}", f"BACKEND_{name.replace('-', '_').upper()}", text, "a number from 0 to 600")
        for name in ("drain-seconds", "shutdown-timeout")
        for text in ("", "-0.1", "601", "soon", "nan", "inf", "-inf")
    ]
    + [
        (f"--max-{name}", f"BACKEND_MAX_{name.replace('-', '_').upper()}", text, "a whole number from")
        for name in ("running-requests", "waiting-requests", "waiting-tokens")
        for text in ("-1", "1.5", "many")
    ]
    + [
        ("--frontends", "BACKEND_FRONTENDS", text, "a whole number from 1 to 64")
        for text in ("", "0", "65", "2.0", "all")
    ]
    + [("--log-level", "BACKEND_LOG_LEVEL", text, ", ".join(LOG_LEVELS)) for text in ("", "loud", "10", "critical")]
    + [("--log-format", "BACKEND_LOG_FORMAT", text, ", ".join(LOG_FORMATS)) for text in ("", "xml", "text,json")],
)
def test_a_value_that_cannot_be_used(flag: str, variable: str, text: str, allowed: str) -> None:
    for argv, environ in (([*ADDR, f"{flag}={text}"], {}), ([*ADDR], {variable: text})):
        with pytest.raises(SettingsError) as caught:
            parse_settings(argv, environ)
        assert str(caught.value).startswith(flag)
        assert allowed in str(caught.value)


@pytest.mark.parametrize("given", ["127.0.0.1:9090", "[::1]:9090", "metrics.example.org:0"])
def test_the_metrics_address(given: str) -> None:
    assert parse_settings(ADDR, {}).metrics_addr is None
    assert parse_settings(ADDR, {"BACKEND_METRICS_ADDR": ""}).metrics_addr is None
    assert parse_settings(ADDR, {"BACKEND_METRICS_ADDR": given}).metrics_addr == given
    assert parse_settings([*ADDR, "--metrics-addr", given], {"BACKEND_METRICS_ADDR": "x:1"}).metrics_addr == given


@pytest.mark.parametrize("given", ["9090", ":9090", "localhost", "localhost:65536", "unix:/run/metrics"])
def test_a_metrics_address_that_cannot_be_used(given: str) -> None:
    for argv, environ in (([*ADDR, "--metrics-addr", given], {}), ([*ADDR], {"BACKEND_METRICS_ADDR": given})):
        with pytest.raises(SettingsError) as caught:
            parse_settings(argv, environ)
        assert str(caught.value).startswith(f"--metrics-addr {given}: use HOST:PORT")
        assert "unix:PATH" not in str(caught.value)


@pytest.mark.parametrize(("value", "token"), [("secret", "secret"), ("", None), (None, None)])
def test_the_token_comes_from_the_environment_alone(value: str | None, token: str | None) -> None:
    environ = {} if value is None else {"LOCALAI_GRPC_AUTH_TOKEN": value}
    settings = parse_settings(ADDR, environ)
    assert settings.auth_token == token
    assert "secret" not in repr(settings)


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKEND_LOG_LEVEL", "error")
    assert parse_settings(ADDR).log_level == "error"


def test_settings_are_fixed() -> None:
    settings = parse_settings([*ADDR, "--max-message-mib=2"], {})
    assert settings.max_message_bytes == 2 * 1024 * 1024
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.addr = "elsewhere"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("500ms", 0.5), ("2s", 2), ("1m30s", 90), ("1h", 3600), ("1.5s", 1.5), (".5s", 0.5), ("3", 3), ("0.25", 0.25),
        ("1m0.5s", 60.5), ("2000000us", 2), ("2000000µs", 2), ("+2s", 2), (" 2s ", 2), ("", 2), ("1000000ns", 0.001),
    ],
)  # fmt: skip
def test_interval_of_the_parent_watch(text: str, seconds: float) -> None:
    found = parse_settings(ADDR, {"LOCALAI_BACKEND_PARENT_WATCH_INTERVAL": text}).parent_watch
    assert found == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["2 s", "s", "soon", "-1s", "0", "0s", "2d", "1m30", "nan", "inf", "1e3", "2h", "2S"])
def test_interval_of_the_parent_watch_that_cannot_be_used(text: str) -> None:
    with pytest.raises(SettingsError, match=r"LOCALAI_BACKEND_PARENT_WATCH_INTERVAL .*500ms"):
        parse_settings(ADDR, {"LOCALAI_BACKEND_PARENT_WATCH_INTERVAL": text})


@pytest.mark.parametrize(
    ("text", "on"),
    [
        ("false", False),
        ("0", False),
        ("no", False),
        ("off", False),
        ("OFF", False),
        ("true", True),
        ("", True),
        ("1", True),
    ],
)
def test_parent_watch_can_be_switched_off(text: str, on: bool) -> None:
    assert (parse_settings(ADDR, {"LOCALAI_BACKEND_PARENT_WATCH": text}).parent_watch is not None) is on


@pytest.mark.parametrize(
    "value",
    ["s\n", " s", "s ", "   ", "a\tb", "a\x7f", "geh\u00e9im", "\N{FULLWIDTH LATIN SMALL LETTER A}", "a\u200bb"],
    ids=ascii,
)
def test_a_token_that_no_client_could_send(value: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_settings(ADDR, {"LOCALAI_GRPC_AUTH_TOKEN": value})
    assert str(caught.value) == "LOCALAI_GRPC_AUTH_TOKEN: use printable ASCII characters, without blanks at the ends"


TLS_NAMES = (
    ("--tls-cert", "BACKEND_TLS_CERT"),
    ("--tls-key", "BACKEND_TLS_KEY"),
    ("--tls-client-ca", "BACKEND_TLS_CLIENT_CA"),
)


@pytest.mark.parametrize("count", [2, 3])
def test_tls_files(count: int) -> None:
    expected = TlsFiles(*("a", "b", "c")[:count])
    flags = [word for (flag, _), value in zip(TLS_NAMES[:count], "abc", strict=False) for word in (flag, value)]
    environ = {name: value for (_, name), value in zip(TLS_NAMES[:count], "abc", strict=False)}
    assert parse_settings([*ADDR, *flags], {}).tls == expected
    assert parse_settings(ADDR, environ).tls == expected
    assert parse_settings([*ADDR, *flags], {name: "other" for _, name in TLS_NAMES[:count]}).tls == expected
    assert parse_settings(ADDR, {name: "" for _, name in TLS_NAMES}).tls is None
    assert parse_settings([*ADDR, *flags], {}).checks_clients is (count == 3)


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        (["--tls-cert"], "--tls-key too"),
        (["--tls-key"], "--tls-cert too"),
        (["--tls-client-ca"], "--tls-cert and --tls-key too"),
        (["--tls-cert", "--tls-client-ca"], "--tls-key too"),
    ],
)
def test_tls_files_go_together(given: list[str], missing: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_settings([*ADDR, *(f"{flag}=file" for flag in given)], {})
    assert str(caught.value) == f"{given[0]} file: needs {missing}"


@pytest.mark.parametrize(
    ("argv", "value", "expected"),
    [
        ([], None, False),
        ([], "", False),
        ([], "0", False),
        ([], "False", False),
        ([], "1", True),
        ([], "true", True),
        (["--channelz"], "0", True),
    ],
)
def test_channelz(argv: list[str], value: str | None, expected: bool) -> None:
    environ = {} if value is None else {"BACKEND_CHANNELZ": value}
    assert parse_settings([*ADDR, *argv], environ).channelz is expected


def test_channelz_that_is_neither_on_nor_off() -> None:
    with pytest.raises(SettingsError, match="BACKEND_CHANNELZ maybe: use 1, 0, true or false"):
        parse_settings(ADDR, {"BACKEND_CHANNELZ": "maybe"})


@pytest.mark.parametrize(
    ("argv", "check"),
    [(["--check"], ""), (["--check", "org/model"], "org/model"), (["--check", *ADDR], ""), (ADDR, None)],
)
def test_a_check_needs_no_address(argv: list[str], check: str | None) -> None:
    assert parse_settings(argv, {}).check == check


@pytest.mark.parametrize("flag", ["--version", "--help"])
def test_what_is_printed_instead(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_settings([flag], {})
    assert caught.value.code == 0
    out = capsys.readouterr().out
    if flag == "--version":
        assert out == versions() + "\n"
        assert out.startswith("vllm-grpc-backend ")
    else:
        assert "LOCALAI_GRPC_AUTH_TOKEN" in out
        assert max(map(len, out.splitlines())) <= 120


def test_every_flag_is_in_the_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_settings(["--help"], {})
    shown = capsys.readouterr().out
    text = (Path(__file__).parents[2] / "docs" / "running.md").read_text(encoding="utf-8")
    for name in re.findall(r"--[a-z-]+|(?:LOCALAI_)?BACKEND_[A-Z_]+", shown):
        assert f"`{name}" in text, name
