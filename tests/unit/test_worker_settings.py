"""Flags and variables of `run.sh worker`, and what its ranks are started with."""

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import pytest
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from backend.flag_values import SettingsError
from backend.vllm_words import option
from backend.worker_settings import parse_worker_settings

DP = (
    "--data-parallel-size=4",
    "--data-parallel-size-local=2",
    "--start-rank=2",
    "--master-addr=h",
    "--master-port=29600",
)
SECRET = "-".join("abc")
SERVE_DP = (
    "--data-parallel-size 4 --data-parallel-size-local 2 --data-parallel-start-rank 2"
    " --data-parallel-address h --data-parallel-rpc-port 29600"
)


MEMORY = "--worker-extension-cls common.worker_memory.MemoryReport"


def parse(*argv: str, **environ: str) -> Any:
    return parse_worker_settings(["m", *argv], environ)


@pytest.mark.parametrize(
    ("argv", "rank"),
    [
        (DP, f"serve m --headless {SERVE_DP}"),
        ((*DP, "--no-headless"), f"serve m {SERVE_DP}"),
        ((*DP, "--headless=false"), f"serve m {SERVE_DP}"),
        (("--headless", *DP), f"serve m --headless {SERVE_DP}"),
        (
            (*DP, "--vllm-arg", "--tensor-parallel-size", "--vllm-arg=2"),
            f"serve m --headless {SERVE_DP} --tensor-parallel-size 2",
        ),
        ((*DP, "--", "--dtype", "float32"), f"serve m --headless {SERVE_DP} --dtype float32"),
        (
            ("--master-addr=h", "--master-port=29501", "--", "--nnodes", "2", "--node-rank", "1"),
            "serve m --headless --master-addr h --master-port 29501 --nnodes 2 --node-rank 1",
        ),
        (
            ("--", "--nnodes=2", "--node-rank=1", "--master-addr=h", "--master-port=29501"),
            "serve m --headless --nnodes=2 --node-rank=1 --master-addr=h --master-port=29501",
        ),
        (
            ("--master-port=29501", "--", "-n2", "-r=1", "--master_ad", "h"),
            "serve m --headless --master-port 29501 -n2 -r=1 --master_ad h",
        ),
        ((*DP, "--", "-dp=4", "-dpa", "h"), f"serve m --headless {SERVE_DP} -dp=4 -dpa h"),
    ],
)
def test_what_run_sh_is_started_with(argv: tuple[str, ...], rank: str) -> None:
    settings = parse(*argv)
    assert " ".join(settings.rank_argv).replace(f" {MEMORY}", "") == rank
    assert settings.head in (("h", 29600), ("h", 29501))


def test_ranks_can_tell_their_memory() -> None:
    assert MEMORY in " ".join(parse(*DP).rank_argv)
    assert MEMORY not in " ".join(parse(*DP, "--", "--worker-extension-cls=own.Extension").rank_argv)


@pytest.mark.parametrize(
    ("words", "ports"),
    [
        ("", (None, 29501)),
        ("-dp 1", (None, 29501)),
        ("-dp 2", (29550, 29501)),
        ("-dp=2 --data-parallel-rpc-port 29600", (29600, 29501)),
    ],
)
def test_where_nodes_meet_their_head(words: str, ports: tuple[int | None, int | None]) -> None:
    settings = parse("--master-addr=h", "--master-port=29501", "--", "-n", "2", "-r", "1", *words.split())
    assert (settings.handshake_port, settings.store_port) == ports
    assert (parse(*DP).handshake_port, parse(*DP).store_port) == (29600, None)


def test_variables_of_the_orchestrator() -> None:
    settings = parse(
        VLLM_DATA_PARALLEL_SIZE="4",
        VLLM_DATA_PARALLEL_SIZE_LOCAL="2",
        VLLM_DATA_PARALLEL_START_RANK="2",
        VLLM_DP_MASTER_ADDR="[fd00::1]",
        VLLM_DP_MASTER_PORT="29600",
        VLLM_EXTRA_ARGS=r"--dtype,float32,--hf-overrides,{\,}",
        LOCALAI_REGISTER_TO="https://frontend/base/",
        LOCALAI_REGISTRATION_TOKEN=SECRET,
        LOCALAI_NODE_NAME="n",
        LOCALAI_NODE_LABELS="zone=a, tier = fast",
        LOCALAI_HEARTBEAT_INTERVAL="1m30s",
        BACKEND_LINK_TIMEOUT="7.5",
    )
    assert settings.head == ("fd00::1", 29600)
    assert settings.vllm_args == ("--dtype", "float32", "--hf-overrides", "{,}")
    assert settings.register_to == "https://frontend/base"
    assert settings.registration_token == SECRET
    assert settings.node_name == "n"
    assert settings.node_labels == {"zone": "a", "tier": "fast", "node.role": "vllm-follower"}
    assert settings.heartbeat_interval == 90
    assert settings.link_timeout == 7.5
    assert SECRET not in repr(settings)


def test_a_flag_beats_its_variable() -> None:
    assert parse(*DP, VLLM_DATA_PARALLEL_SIZE="9", LOCALAI_NODE_NAME="n").data_parallel_size == 4
    assert parse(*DP).node_name.startswith("vllm-")


def test_the_role_is_not_to_be_had_otherwise() -> None:
    assert parse(*DP, "--node-labels=node.role=head").node_labels == {"node.role": "vllm-follower"}


def test_environment_of_the_ranks() -> None:
    environment = parse(*DP).rank_environment({"LOCALAI_REGISTRATION_TOKEN": SECRET, "VLLM_DP_RANK": "0", "HOME": "/h"})
    assert environment == {
        "HOME": "/h",
        "BACKEND_LINK_TIMEOUT": "3.0",
        "VLLM_DP_MASTER_IP": "h",
        "VLLM_DP_MASTER_PORT": "29600",
        "VLLM_DP_SIZE": "4",
        "VLLM_DP_RANK": "2",
        "VLLM_DP_RANK_LOCAL": "0",
    }


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((*DP[:2], "--start-rank=0", *DP[3:]), "--start-rank 0: is the head's, which LoadModel starts; use 1 or more"),
        (("--", "--nnodes=2", "--node-rank=0"), "--vllm-arg --node-rank: 0 is the head's"),
        (("--", "--nnodes=2"), "--vllm-arg --node-rank: 0 is the head's"),
        (("--", "-n2", "-r0"), "--vllm-arg --node-rank: 0 is the head's"),
        (("--", "--nnode", "2", "--node=1", "--node_rank=0"), "--vllm-arg --node-rank: 0 is the head's"),
        (("--", "--nnodes=2", "--node-rank=1"), "--master-addr: is missing"),
        ((*DP, "--", "-dp", "3"), "--vllm-arg --data-parallel-size: is 3, but the worker's own flags say 4; leave it"),
        ((*DP, "--", "--data-parallel-addr=b"), "--vllm-arg --data-parallel-address: is b, but the worker's own flags"),
        ((*DP, "--", "-dpl=1"), "--vllm-arg --data-parallel-size-local: is 1, but"),
        ((), "--data-parallel-size: is missing; it is needed unless --vllm-arg has --nnodes"),
        (DP[:1], "--data-parallel-size-local: is missing"),
        (DP[:3], "--master-addr: is missing"),
        (DP[:4], "--master-port: is missing"),
        ((*DP, "--data-parallel-size=two"), "--data-parallel-size two: use a whole number from 1 to 65536"),
        ((*DP, "--data-parallel-size-local=0"), "--data-parallel-size-local 0: use a whole number from 1 to 4"),
        ((*DP, "--start-rank=3"), "--start-rank 3: with 2 ranks from there on there would be more than 4"),
        ((*DP, "--master-port=70000"), "--master-port 70000: use a whole number from 1 to 65535"),
        ((*DP, "--master-addr=a..b"), "--master-addr a..b: use an address or a host name"),
        ((*DP, f"--master-addr={'h' * 64}"), "--master-addr hhhh"),
        ((*DP, "--headless=maybe"), "--headless maybe: use 1, 0, true or false"),
        ((*DP, "--register-to=frontend:8080"), "--register-to: use the frontend's URL"),
        ((*DP, "--register-to=ftp://frontend"), "--register-to: use the frontend's URL"),
        ((*DP, "--register-to=http://frontend:99999"), "--register-to: use the frontend's URL"),
        ((*DP, "--register-to=http://frontend\n"), "--register-to: use the frontend's URL"),
        ((*DP, f"--register-to=http://u:{SECRET}@f", "--registration-token=t"), "--registration-token is given too"),
        ((*DP, f"--registration-token={SECRET}\n"), "--registration-token (LOCALAI_REGISTRATION_TOKEN): has a line"),
        ((*DP, f"--registration-token={SECRET}\udcff"), "--registration-token (LOCALAI_REGISTRATION_TOKEN): has a"),
        ((*DP, "--node-labels=zone"), "--node-labels zone: use k=v, with commas between them"),
        ((*DP, f"--node-name={'n' * 256}"), "--node-name of 256 characters: use 1 to 255"),
        ((*DP, "--heartbeat-interval=soon"), "--heartbeat-interval soon: use a duration"),
        ((*DP, "--heartbeat-interval=0s"), "--heartbeat-interval 0s: use a duration"),
    ],
)
def test_what_cannot_be_used(argv: tuple[str, ...], message: str) -> None:
    with pytest.raises(SettingsError) as error:
        parse(*argv)
    assert message in str(error.value)
    assert SECRET not in str(error.value)


FLAGS = {
    "--nnodes": "-n",
    "--node-rank": "-r",
    "--master-addr": None,
    "--master-port": None,
    "--worker-extension-cls": None,
    "--data-parallel-size": "-dp",
    "--data-parallel-size-local": "-dpl",
    "--data-parallel-start-rank": "-dpr",
    "--data-parallel-address": "-dpa",
    "--data-parallel-rpc-port": "-dpp",
}


def spellings() -> Iterator[list[str]]:
    """Every beginning of every flag that is read here, and the short ones, with the value in all places."""
    for flag, short in FLAGS.items():
        names = [flag[:length] for length in range(3, len(flag) + 1)]
        for name in [
            *names,
            *(name.replace("-", "_").replace("__", "--", 1) for name in names),
            *filter(None, [short]),
        ]:
            yield [name, "7"]
            yield [f"{name}=7"]
        if short:
            yield [f"{short}7"]
            yield [short, "8", flag, "7"]


def test_vllms_flags_are_read_as_vllm_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it refuses does not matter: the ranks then say why."""
    monkeypatch.setattr("sys.stderr", io.StringIO())
    parser = make_arg_parser(FlexibleArgumentParser())
    taken = 0
    for words in spellings():
        with contextlib.suppress(SystemExit):
            found = parser.parse_args(["m", *words])
            theirs = {flag: getattr(found, flag[2:].replace("-", "_")) for flag in FLAGS}
            expected = {flag: "7" if str(value) == "7" else None for flag, value in theirs.items()}
            assert {flag: option(words, flag, short) for flag, short in FLAGS.items()} == expected, words
            taken += 1
    assert taken > 200


def test_a_password_of_the_frontend_s_is_not_shown() -> None:
    settings = parse(*DP, f"--register-to=https://u:{SECRET}@frontend")
    assert settings.register_to == f"https://u:{SECRET}@frontend"
    assert SECRET not in repr(settings)
