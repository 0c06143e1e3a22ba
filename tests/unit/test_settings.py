"""Flags, environment and defaults, and what is said about values that can't be used."""

import dataclasses

import pytest

from backend.settings import LOG_LEVELS, Settings, SettingsError, parse_settings

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


def test_defaults() -> None:
    assert parse_settings(ADDR, {}) == Settings(
        addr="127.0.0.1:0", max_message_mib=50, log_level="info", shutdown_timeout=10.0, auth_token=None
    )


@pytest.mark.parametrize(
    ("flag", "variable", "field", "values"),
    [
        ("--max-message-mib", "BACKEND_MAX_MESSAGE_MIB", "max_message_mib", {"7": 7, "2047": 2047, "1": 1}),
        ("--log-level", "BACKEND_LOG_LEVEL", "log_level", {"DEBUG": "debug", "Warning": "warning"}),
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
        for text in ("", "0", "-1", "2048", "1.5", "many", "nan", "9" * 30)
    ]
    + [
        ("--shutdown-timeout", "BACKEND_SHUTDOWN_TIMEOUT", text, "a number from 0 to 600")
        for text in ("", "-0.1", "601", "soon", "nan", "inf", "-inf")
    ]
    + [("--log-level", "BACKEND_LOG_LEVEL", text, ", ".join(LOG_LEVELS)) for text in ("", "loud", "10", "critical")],
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
