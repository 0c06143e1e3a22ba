"""What `run.sh worker` is told: flags first, then the environment, under the names that the orchestrator's own has."""

import argparse
import dataclasses
import os
import socket
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from backend import vllm_words
from backend.flag_values import SettingsError, one_of, seconds, switch, whole
from backend.settings import LOG_FORMATS, LOG_LEVELS
from common import links, worker_memory

# How a node selector of the orchestrator keeps other models away: {"!node.role": "vllm-follower"}.
ROLE = ("node.role", "vllm-follower")
_RPC_PORT = "29550"  # vLLM's default
TOKEN = "LOCALAI_REGISTRATION_TOKEN"  # noqa: S105  # the variable's name
_EPILOG = """\
environment without a flag:
  BACKEND_LINK_TIMEOUT   seconds after which a machine that does not answer counts as gone (default 3)
  BACKEND_LOG_LEVEL, BACKEND_LOG_FORMAT, and vLLM's own, as for the server

a model over several machines by tensor or pipeline parallelism needs no flag of data parallelism: `--vllm-arg` hands
--nnodes, --node-rank and so on over to vLLM, and so does everything behind `--`.
exit status: vLLM's own; 1 where the frontend takes no registration, 2 for flags that can't be used. Ranks that lose
their head are started again and wait for the next one. docs/distributed.md has the rest.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """What the supervisor of a follower was told, once, at its start."""

    model: str
    """Hub id or folder, the same as the head's."""
    head: tuple[str, int]
    """Host and port where the head takes ranks in: of data parallelism's handshake, or of torch.distributed."""
    data_parallel_size: int | None = None
    """Ranks of data parallelism on all machines; None: data parallelism is not what spans them."""
    data_parallel_size_local: int = 1
    """How many of them run here."""
    start_rank: int = 0
    """The first of them."""
    headless: bool = True
    """Whether the head alone answers requests."""
    vllm_args: tuple[str, ...] = ()
    """Handed to `vllm serve` as they are."""
    register_to: str | None = dataclasses.field(default=None, repr=False)
    """URL of the orchestrator's frontend; None registers nowhere."""
    registration_token: str | None = dataclasses.field(default=None, repr=False)
    """What the frontend asks for."""
    node_name: str = ""
    """What the frontend calls this node."""
    node_labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """By which it can be selected."""
    heartbeat_interval: float = 10.0
    """Seconds between two heartbeats; the frontend takes a node for gone after 60 without one."""
    link_timeout: float = links.DEFAULT_TIMEOUT
    """Seconds after which a machine that does not answer counts as gone."""
    log_level: str = "info"
    log_format: str = "text"

    @property
    def handshake_port(self) -> int | None:
        """Where the head takes data-parallel ranks in, if there are any."""
        if self.data_parallel_size is not None:
            return self.head[1]
        size = vllm_words.option(self.vllm_args, "--data-parallel-size", "-dp")
        port = vllm_words.option(self.vllm_args, "--data-parallel-rpc-port", "-dpp") or _RPC_PORT
        return int(port) if size not in (None, "1") and port.isdecimal() else None

    @property
    def store_port(self) -> int | None:
        """Where nodes meet, if there are any."""
        return self.head[1] if self.data_parallel_size is None else None

    @property
    def rank_argv(self) -> list[str]:
        """What run.sh is started with."""
        argv = ["serve", self.model]
        if self.headless:
            argv.append("--headless")
        host, port = self.head
        if self.data_parallel_size is not None:
            argv += ["--data-parallel-size", str(self.data_parallel_size)]
            argv += ["--data-parallel-size-local", str(self.data_parallel_size_local)]
            argv += ["--data-parallel-start-rank", str(self.start_rank)]
            argv += ["--data-parallel-address", host, "--data-parallel-rpc-port", str(port)]
        else:
            for flag, value in (("--master-addr", host), ("--master-port", str(port))):
                argv += [flag, value] if vllm_words.option(self.vllm_args, flag) is None else []
        if vllm_words.option(self.vllm_args, "--worker-extension-cls") is None:
            # By which the head asks all ranks for their memory.
            argv += ["--worker-extension-cls", worker_memory.EXTENSION]
        return [*argv, *self.vllm_args]

    def rank_environment(self, environ: Mapping[str, str]) -> dict[str, str]:
        """`environ` as the ranks get it: without the token, with vLLM's variables for data parallelism."""
        environment = {name: value for name, value in environ.items() if name != TOKEN}
        environment[links.VARIABLE] = str(self.link_timeout)
        if self.data_parallel_size is not None:
            host, port = self.head
            environment |= {
                "VLLM_DP_MASTER_IP": host,
                "VLLM_DP_MASTER_PORT": str(port),
                "VLLM_DP_SIZE": str(self.data_parallel_size),
                "VLLM_DP_RANK": str(self.start_rank),
                "VLLM_DP_RANK_LOCAL": "0",
            }
        return environment


def parse_worker_settings(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> WorkerSettings:
    """Settings from the command line behind `worker`, and the environment.

    Raises:
        SettingsError: a value that can't be used. (argparse itself exits for unknown flags.)

    """
    flags = _parser(environ).parse_args(vllm_words.joined(argv))
    extra = environ.get("VLLM_EXTRA_ARGS", "")
    vllm_args = tuple(vllm_words.split(extra) if flags.vllm_arg is None else flags.vllm_arg)
    headless = switch("--headless", flags.headless)
    common = {
        "model": flags.model,
        "headless": headless,
        "vllm_args": vllm_args,
        "register_to": _url(flags.register_to, flags.registration_token),
        "registration_token": _token(flags.registration_token),
        "node_name": _name(flags.node_name),
        "node_labels": _labels(flags.node_labels),
        "heartbeat_interval": seconds("--heartbeat-interval", flags.heartbeat_interval, 0.1, 3600),
        "link_timeout": links.timeout(environ),
        "log_level": one_of("BACKEND_LOG_LEVEL", environ.get("BACKEND_LOG_LEVEL", "info"), LOG_LEVELS),
        "log_format": one_of("BACKEND_LOG_FORMAT", environ.get("BACKEND_LOG_FORMAT", "text"), LOG_FORMATS),
    }
    node_rank = vllm_words.option(vllm_args, "--node-rank", "-r")
    if vllm_words.option(vllm_args, "--nnodes", "-n") is not None and flags.data_parallel_size in (None, "1"):
        if headless and node_rank in (None, "0"):
            raise SettingsError("--vllm-arg --node-rank: 0 is the head's, which LoadModel starts; use 1 or more")
        host = vllm_words.option(vllm_args, "--master-addr") or flags.master_addr
        port = vllm_words.option(vllm_args, "--master-port") or flags.master_port
        return WorkerSettings(head=_head(host, port), **common)
    for flag in ("data_parallel_size", "data_parallel_size_local", "start_rank"):
        if getattr(flags, flag) is None:
            raise SettingsError(f"--{flag.replace('_', '-')}: is missing; it is needed unless --vllm-arg has --nnodes")
    size = whole("--data-parallel-size", flags.data_parallel_size, 1, 65536)
    local = whole("--data-parallel-size-local", flags.data_parallel_size_local, 1, size)
    start = whole("--start-rank", flags.start_rank, 0, size - 1)
    if headless and start == 0:
        raise SettingsError("--start-rank 0: is the head's, which LoadModel starts; use 1 or more with --headless")
    if start + local > size:
        raise SettingsError(f"--start-rank {start}: with {local} ranks from there on there would be more than {size}")
    head = _head(flags.master_addr, flags.master_port)
    for name, short, own in (
        ("--data-parallel-size", "-dp", size),
        ("--data-parallel-size-local", "-dpl", local),
        ("--data-parallel-start-rank", "-dpr", start),
        ("--data-parallel-address", "-dpa", head[0]),
        ("--data-parallel-rpc-port", "-dpp", head[1]),
    ):
        # vLLM would take the last one, and the head of another line would not be watched.
        if (given := vllm_words.option(vllm_args, name, short)) not in (None, str(own)):
            raise SettingsError(f"--vllm-arg {name}: is {given}, but the worker's own flags say {own}; leave it out")
    return WorkerSettings(
        head=head,
        data_parallel_size=size,
        data_parallel_size_local=local,
        start_rank=start,
        **common,
    )


def _parser(environ: Mapping[str, str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run.sh worker",
        description="Run ranks of a model whose head is on another machine, watch them, and tell the orchestrator.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="hub id or folder, the same as the head's")

    def flag(name: str, variable: str, text: str, default: str | None = None) -> None:
        help_text = f"{text} ({f'default {default}; ' if default else ''}{variable})"
        parser.add_argument(name, default=environ.get(variable) or default, help=help_text)

    flag("--data-parallel-size", "VLLM_DATA_PARALLEL_SIZE", "ranks on all machines")
    flag("--data-parallel-size-local", "VLLM_DATA_PARALLEL_SIZE_LOCAL", "ranks on this one")
    flag("--start-rank", "VLLM_DATA_PARALLEL_START_RANK", "the first of them; 0 is the head's")
    flag("--master-addr", "VLLM_DP_MASTER_ADDR", "the head's address or host name")
    flag("--master-port", "VLLM_DP_MASTER_PORT", "the head's data_parallel_rpc_port, or master_port")
    parser.add_argument(
        "--headless",
        default=environ.get("VLLM_HEADLESS") or "true",
        help="the head alone answers requests (default true; VLLM_HEADLESS)",
    )
    parser.add_argument("--no-headless", dest="headless", action="store_const", const="false", help="vllm serve does")
    parser.add_argument(
        "--vllm-arg",
        action="append",
        metavar="WORD",
        help="one word more for vllm serve, as it is; may be repeated (VLLM_EXTRA_ARGS, with commas between them)",
    )
    flag("--register-to", "LOCALAI_REGISTER_TO", "URL of the orchestrator's frontend; without one: nowhere")
    parser.add_argument(
        "--registration-token",
        default=environ.get(TOKEN) or None,
        help=f"what the frontend asks for; others on this machine see a flag, but not the variable ({TOKEN})",
    )
    flag("--node-name", "LOCALAI_NODE_NAME", "this node's name there", f"vllm-{socket.gethostname()}")
    flag("--node-labels", "LOCALAI_NODE_LABELS", f"k=v,k=v; {'='.join(ROLE)} is always one of them")
    flag("--heartbeat-interval", "LOCALAI_HEARTBEAT_INTERVAL", "how often it hears of this one", "10s")
    return parser


def _head(host: str | None, port: str | None) -> tuple[str, int]:
    if not host:
        raise SettingsError("--master-addr: is missing; it is the head's address or host name")
    if not port:
        raise SettingsError("--master-port: is missing; it is the head's data_parallel_rpc_port, or master_port")
    try:
        host.encode("idna")  # as whoever resolves it does
    except UnicodeError:
        raise SettingsError(
            f"--master-addr {host}: use an address or a host name, of labels of 1 to 63 characters"
        ) from None
    return host.strip("[]"), whole("--master-port", port, 1, 65535)


def _labels(text: str | None) -> dict[str, str]:
    labels = {}
    for pair in filter(None, (part.strip() for part in (text or "").split(","))):
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not name or not equals:
            raise SettingsError(f"--node-labels {pair}: use k=v, with commas between them")
        labels[name] = value
    return labels | dict([ROLE])


def _name(text: str) -> str:
    if not 0 < len(text) <= 255:
        raise SettingsError(f"--node-name of {len(text)} characters: use 1 to 255")
    return text


def _url(text: str | None, token: str | None) -> str | None:
    """Of what it says nothing is repeated: it may hold a password."""
    if not text:
        return None
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or not _is_word(text):
        raise SettingsError("--register-to: use the frontend's URL, http://HOST:PORT or https://HOST")
    if token and parts.username is not None:
        raise SettingsError(
            "--register-to: has a user and a password, and --registration-token is given too; a request can show one"
            " of them, so leave out the other"
        )
    return text.rstrip("/")


def _token(text: str | None) -> str | None:
    if text and not _is_word(text):
        raise SettingsError(
            f"--registration-token ({TOKEN}): has a line break, a blank or a control character in it or at its end,"
            " which can't be sent; a file's last line break is one"
        )
    return text


def _is_word(text: str) -> bool:
    return text.isprintable() and not any(map(str.isspace, text))
