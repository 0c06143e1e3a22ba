"""Flags and variables of `run.sh worker`, and what its ranks are started with."""

from typing import Any

import pytest

from backend.settings import SettingsError
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
    ],
)
def test_what_run_sh_is_started_with(argv: tuple[str, ...], rank: str) -> None:
    settings = parse(*argv)
    assert " ".join(settings.rank_argv).replace(f" {MEMORY}", "") == rank
    assert settings.head in (("h", 29600), ("h", 29501))


def test_ranks_can_tell_their_memory() -> None:
    assert MEMORY in " ".join(parse(*DP).rank_argv)
    assert MEMORY not in " ".join(parse(*DP, "--", "--worker-extension-cls=own.Extension").rank_argv)


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
        (("--", "--nnodes=2", "--node-rank=1"), "--master-addr: is missing"),
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
        ((*DP, "--headless=maybe"), "--headless maybe: use true or false"),
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


def test_a_password_of_the_frontend_s_is_not_shown() -> None:
    settings = parse(*DP, f"--register-to=https://u:{SECRET}@frontend")
    assert settings.register_to == f"https://u:{SECRET}@frontend"
    assert SECRET not in repr(settings)
