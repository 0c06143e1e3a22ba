"""The page about the files, and the pages with command lines of several machines."""

import json
import re
import shlex

import pytest
from google.protobuf import json_format

from common.engine_args import plan_load
from common.pb import backend_pb2 as pb
from tests.deploy.commands import DEPLOY, ROOT, follower, serve

PAGES = ("docs/deploy/README.md", "docs/planning.md")


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def test_every_file_has_its_row_and_every_link_its_file() -> None:
    page = text(PAGES[0])
    links = {link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", page)}
    assert all((DEPLOY / link).exists() for link in links)
    files = {str(path.relative_to(DEPLOY)) for path in DEPLOY.rglob("*") if path.is_file()}
    assert files - links == {"README.md", "Dockerfile.ray.dockerignore"}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    folder = (ROOT / page).parent
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text(page)) if "://" not in link]
    assert all((folder / link).exists() for link in links)


def test_command_lines_are_taken() -> None:
    workers = [line for line in re.findall(r"^ +run\.sh (worker .*)$", text(PAGES[1]), re.MULTILINE) if "…" not in line]
    assert workers
    for line in workers:
        assert follower(shlex.split(line)).data_parallel_size == 4
    for line in re.findall(r"^ +run\.sh (serve .*[^…])$", text(PAGES[1]), re.MULTILINE):
        serve(shlex.split(line))


def test_loads_are_taken() -> None:
    args = [json.loads(line) for line in re.findall(r"^ +(\{.*\})$", text(PAGES[1]), re.MULTILINE)]
    (words,) = re.findall(r"grpcurl -plaintext -d '(.*)' \\$", text(PAGES[0]), re.MULTILINE)
    args.append(json.loads(json_format.ParseDict(json.loads(words), pb.ModelOptions()).EngineArgs))
    assert len(args) == 2
    for each in args:
        plan = plan_load(pb.ModelOptions(Model="org/model", EngineArgs=json.dumps(each)))
        assert plan.engine_args["data_parallel_size"] == 4


def test_images_are_built_as_their_files_say() -> None:
    plain, ray = ((DEPLOY / name).read_text(encoding="utf-8") for name in ("Dockerfile", "Dockerfile.ray"))
    stages = re.findall(r"^FROM \S+ AS (\w+)$", plain, re.MULTILINE)
    assert stages == ["server", "gpu", "files"]
    assert set(re.findall(r"--target (\w+)", plain)) <= set(stages)
    # What apt-get needs, and then no more.
    assert re.findall(r"^USER (\d+)$", plain, re.MULTILINE) == ["65534", "0", "65534"]
    for name in ("compose.nvidia.yaml", "compose.intel.yaml", "leaderworkerset.yaml"):
        assert "vllm-backend-server" in (DEPLOY / name).read_text(encoding="utf-8")
    assert "-t vllm-backend-server" in plain
    assert "-t vllm-backend-ray" in ray
    assert "image: vllm-backend-ray" in (DEPLOY / "kuberay.yaml").read_text(encoding="utf-8")


def test_what_the_image_of_ray_installs_there_is() -> None:
    words = shlex.split(
        re.findall(r"^RUN (./install.sh .*)$", (DEPLOY / "Dockerfile.ray").read_text(), re.MULTILINE)[0]
    )
    assert words == ["./install.sh", "$PROFILE", "--elsewhere", "--extra", "ray"]
    assert '\nray = ["ray>=' in text("pyproject.toml")
    ignored = (DEPLOY / "Dockerfile.ray.dockerignore").read_text(encoding="utf-8").split()
    assert {".venv", ".git", ".models"} <= set(ignored)
