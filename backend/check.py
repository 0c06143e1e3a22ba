"""`run.sh --check [MODEL]`: what is installed here, what would be used, and whether it can serve."""

import os

from backend import metrics_port, private_folder
from backend.server import import_channelz
from backend.settings import Settings
from backend.sockets import check_bindable
from backend.versions import versions
from common import private_folders
from common.errors import LoadFailed
from common.vllm_env import prepare_environment


def run(settings: Settings) -> tuple[int, str | None]:
    """Print a row for each finding; the exit status (0: can serve, 1: can't) and the reason.

    Raises:
        SettingsError: an address can't be listened on, a TLS file or the temporary folder can't be used, or channelz
            is asked for and not installed.

    """
    if settings.channelz:
        import_channelz()
    _row("backend", versions())
    if settings.addr:
        check_bindable(settings.addr)
    _row("--addr", settings.addr or "not given")
    if settings.metrics_addr:
        metrics_port.bind(settings.metrics_addr).close()
    _row("--metrics-addr", settings.metrics_addr or "not given")
    if settings.frontends > 1:
        private_folders.remove(private_folder.make())
    _row("--frontends", str(settings.frontends))
    _row("callers need", _needs(settings))
    prepare_environment()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        try:
            from common import installation
        except Exception as error:
            raise LoadFailed(f"vLLM can't be imported: {type(error).__name__}: {error}") from error
        for name, value in installation.environment():
            _row(name, value)
        if settings.check:
            for name, value in installation.model(settings.check):
                _row(name, value)
    except LoadFailed as error:
        _row("can serve", "no")
        return 1, str(error)
    _row("can serve", "yes")
    return 0, None


def _needs(settings: Settings) -> str:
    needs = ["the token"] if settings.auth_token else []
    if settings.tls is not None:
        from backend.tls import server_credentials

        server_credentials(settings.tls)
        needs.append("TLS" if settings.tls.client_ca is None else "TLS with a certificate of their own")
    return " and ".join(needs) or "nothing"


def _row(name: str, value: str) -> None:
    print(f"{name + ':':<26}{' '.join(value.split())}", flush=True)  # noqa: T201  # the report itself
