"""The files for Docker Compose: valid, complete, and of one mind."""

import re
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

from tests.deploy.commands import DEPLOY, agree, follower, load, server

ENVIRONMENT = {"MODELS": "/srv/models", "HEAD": "10.0.0.1", "RENDER_GROUP": "993"}
# Machines of the sizes in the files, and the first ranks of those beside the head.
FILES = {"compose.nvidia.yaml": ["2"], "compose.intel.yaml": ["1"]}
_VARIABLE = re.compile(r"\$(?:\$|\{([A-Z_]+)(?::([-?])([^}]*))?\})")


def interpolated(text: str, environ: dict[str, str]) -> str:
    """As Compose does it, for the forms that these files have."""

    def value(match: re.Match[str]) -> str:
        name, kind, rest = match.groups()
        if name is None:
            return "$"
        if kind == "?" and not environ.get(name):
            raise KeyError(name)
        if kind is None and name not in environ:
            raise KeyError(name)
        return environ.get(name) or (rest if kind == "-" else "")

    return _VARIABLE.sub(value, text)


def read(name: str, **environ: str) -> dict[str, Any]:
    text = (DEPLOY / name).read_text(encoding="utf-8")
    code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    found: dict[str, Any] = yaml.safe_load(interpolated(code, ENVIRONMENT | environ))
    return found


def validate(found: dict[str, Any]) -> None:
    """By the schema of compose-spec, which knows no other keys."""
    PyCompose.from_yaml(yaml.safe_dump(found))


@pytest.mark.parametrize("name", FILES)
def test_it_is_valid(name: str) -> None:
    found = read(name)
    validate(found)
    assert set(found["services"]) == {"head", "follower", "load"}
    for service, body in found["services"].items():
        assert body["profiles"] == [service]
        assert body["network_mode"] == "host"


@pytest.mark.parametrize("name", FILES)
def test_a_key_that_compose_does_not_know_is_noticed(name: str) -> None:
    found = read(name)
    found["services"]["head"]["shm_sise"] = "16gb"
    with pytest.raises(ValueError, match="shm_sise"):
        validate(found)


@pytest.mark.parametrize(("name", "ranks"), FILES.items())
def test_the_follower_agrees_with_what_is_loaded(name: str, ranks: list[str]) -> None:
    services = read(name)["services"]
    settings = server(services["head"]["command"])
    address, head = load(services["load"]["command"])
    assert settings.addr.rpartition(":")[2] == address.rpartition(":")[2]
    assert head.data_parallel_address == ENVIRONMENT["HEAD"]
    agree(head, [follower(read(name, START_RANK=rank)["services"]["follower"]["command"]) for rank in ranks])
    # What it is without a word about the rank is the second machine.
    agree(head, [follower(services["follower"]["command"])])


@pytest.mark.parametrize("name", FILES)
def test_what_must_be_set_is_asked_for(name: str) -> None:
    for variable in ("MODELS", "HEAD"):
        with pytest.raises(KeyError, match=variable):
            read(name, **{variable: ""})


@pytest.mark.parametrize("name", FILES)
def test_memory_and_devices(name: str) -> None:
    services = read(name)["services"]
    for service in ("head", "follower"):
        body = services[service]
        assert body["shm_size"] == "16gb"
        assert body["cap_add"] == ["IPC_LOCK"]
        assert body["ulimits"]["memlock"] == -1
        assert body["volumes"][0] == "/srv/models:/models:ro"
        if name == "compose.nvidia.yaml":
            (device,) = body["deploy"]["resources"]["reservations"]["devices"]
            assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
            assert "compute" in body["environment"]["NVIDIA_DRIVER_CAPABILITIES"]
        else:
            assert body["devices"] == ["/dev/dri:/dev/dri"]
            assert body["group_add"] == ["993"] or body["group_add"] == [993]
        # The worker's farewell takes up to a minute.
        assert int(body["stop_grace_period"].removesuffix("s")) >= 60


@pytest.mark.parametrize("name", FILES)
def test_the_token_is_the_servers_and_the_loads(name: str) -> None:
    services = read(name, LOCALAI_GRPC_AUTH_TOKEN="secret")["services"]  # noqa: S106  # a test's
    assert server(services["head"]["command"], services["head"]["environment"]).auth_token == "secret"  # noqa: S105
    words = services["load"]["command"]
    assert "-H=authorization: Bearer ${LOCALAI_GRPC_AUTH_TOKEN}" in words
    assert "-expand-headers" in words
    assert services["load"]["environment"]["LOCALAI_GRPC_AUTH_TOKEN"] == "secret"  # noqa: S105
    assert not any("secret" in word for word in words)


def test_infiniband_is_laid_over_services_that_there_are() -> None:
    over, under = read("compose.infiniband.yaml"), read("compose.nvidia.yaml")
    assert set(over["services"]) == {"head", "follower"} <= set(under["services"])
    for name, body in over["services"].items():
        merged = under["services"][name]
        merged["devices"] = merged.get("devices", []) + body["devices"]
        merged["environment"] |= body["environment"]
        assert "/dev/infiniband:/dev/infiniband" in merged["devices"]
    validate(over)
    validate(under)


@pytest.mark.parametrize("name", [*FILES, "compose.infiniband.yaml"])
def test_the_variables_are_explained(name: str) -> None:
    text, readme = ((DEPLOY / file).read_text(encoding="utf-8") for file in (name, "README.md"))
    used = {match[1] for match in _VARIABLE.finditer(text) if match[1]}
    assert used
    for variable in used:
        assert f"`{variable}`" in readme
