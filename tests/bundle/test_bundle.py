"""`make test-bundle`: the bundle serves where there is nothing, wherever it lies; `BUNDLE` names its folder."""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bundle.bare import Bare, is_private, loopback
from tests.cluster.lines import answers, expected, in_background, options, waits
from tests.models import ensure
from tests.models.script import line
from tests.process.orchestrator import Backend, free_port
from tests.process.wire import PARSERS, chat, check_shape, content, model_options, predict_options

# Loading with the compiler at work takes minutes on two cores.
pytestmark = [
    pytest.mark.skipif("BUNDLE" not in os.environ, reason="make test-bundle packs a bundle first"),
    pytest.mark.timeout(1200),
]

ODD = "/opt/an odd place, näme & 'quote'"
MOVED = "/srv/elsewhere"
PORT_SECONDS = 30.0  # what the orchestrator gives it; the first start reads everything from the disk
LINES = ("plain", "reasoning", "tool", "unicode")


@pytest.fixture(scope="module")
def bundle() -> Path:
    return Path(os.environ["BUNDLE"]).resolve(strict=True)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bare]:
    assert is_private(), "make test-bundle calls unshare"
    loopback()
    folder = tmp_path_factory.mktemp("bare")
    for each in (folder, *folder.parents[:2]):
        each.chmod(0o755)  # pytest keeps its folders from other users, and the server is one
    bare = Bare(folder)
    for name in ("scripted", "smollm2"):
        place = bare.root / "models" / name
        shutil.copytree(ensure(name), place)
        for path in (place, *place.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
    yield bare
    for name in ("models", "tmp"):
        shutil.rmtree(bare.root / name)  # pytest keeps its folders


def server(bare: Bare, run_sh: str, **environment: str) -> Backend:
    """run.sh in an environment that has no HOME and an empty PATH."""
    addr = f"127.0.0.1:{free_port()}"
    program, *argv = bare.argv(run_sh, "--addr", addr, **({"PATH": ""} | environment))
    return Backend(run_sh=program, argv=argv, addr=addr, cwd=Path("/"))


def load(backend: Backend, model: str, **fields: str) -> None:
    """Wait for the port, load the model, and print how long both took."""
    port = backend.wait_for_health(PORT_SECONDS)
    started = time.monotonic()
    with backend.connection() as stub:
        parsers = PARSERS if model == "scripted" else ()
        options = model_options(Path("/models") / model, *parsers, DType="float32", **fields)
        result = stub.LoadModel(options, timeout=900)
    assert result.success, result.message
    print(f"\nstart to port {port:.1f} s, port to ready {time.monotonic() - started:.1f} s")


def check_script(backend: Backend) -> None:
    for name in LINES:
        asked = line(name)
        replies = backend.stream(predict_options(asked))
        check_shape(replies)
        assert content(replies).strip() == asked.answer.partition("<tool_call>")[0].strip()


def check_paris(backend: Backend) -> None:
    replies = backend.stream(chat("What is the capital of France?", Tokens=32))
    check_shape(replies)
    assert "Paris" in content(replies)


def is_loaded(path: Path, bundle: Path) -> bool:
    """Whether it is a library or a program, and not just what the compiler links."""
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(18)
    if head[:4] != b"\x7fELF" or head[16] not in {2, 3}:
        return False
    linked = path.is_relative_to(bundle / "toolchain/usr/lib") or path.is_relative_to(bundle / "toolchain/usr/lib64")
    return not linked or path.name in {"cc1plus", "collect2", "liblto_plugin.so"}


def libraries(bare: Bare, inside: str, search: str, folder_of: dict[str, str]) -> list[str]:
    """The paths that the loader finds for what a file needs.

    What its package loads before it, from another folder of the bundle, counts as found.
    """
    while True:
        done = bare.run("/lib64/ld-linux-x86-64.so.2", "--list", inside, LD_LIBRARY_PATH=search)
        said = done.stdout + done.stderr
        lacking = re.search(r"(\S+): cannot open shared object file", said) or re.search(r"(\S+) => not found", said)
        if not lacking:
            assert done.returncode == 0 or "statically linked" in said, (inside, said)
            return re.findall(r"=> (/.*) \(0x", done.stdout)
        folder = folder_of.get(lacking[1])
        assert folder, (inside, said)
        assert folder not in search.split(":"), (inside, said)
        search += f":{folder}"


@pytest.fixture
def at_an_odd_place(bare: Bare, bundle: Path) -> Iterator[str]:
    with bare.lying(bundle, ODD):
        yield f"{ODD}/run.sh"


@pytest.fixture
def moved(bare: Bare, bundle: Path) -> Iterator[str]:
    with bare.lying(bundle, MOVED):
        yield f"{MOVED}/run.sh"


def test_the_machine_has_nothing(bare: Bare) -> None:
    for program in ("python3", "g++", "cc", "ls", "readlink", "env"):
        assert bare.run("/bin/sh", "-c", f"command -v {program}").returncode != 0
    assert not (bare.root / "etc").exists()


def test_the_manifest_lists_every_file(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    listed = {entry["path"]: entry for entry in manifest["files"]}
    for path in (path for path in bundle.rglob("*") if path.is_symlink() or path.is_file()):
        name = str(path.relative_to(bundle))
        if name == "manifest.json":
            continue
        entry = listed.pop(name)
        if path.is_symlink():
            assert entry["link"] == str(path.readlink())
            assert path.resolve(strict=True).is_relative_to(bundle)
        else:
            assert entry["size"] == path.stat().st_size
            with path.open("rb") as file:
                assert entry["sha256"] == hashlib.file_digest(file, "sha256").hexdigest(), name
    assert not listed


def test_no_file_names_the_folder_it_was_made_in(bundle: Path) -> None:
    texts = (path for path in bundle.rglob("*") if path.suffix in {".py", ".sh", ".txt", ".json", ".cfg", ".pth"})
    home = str(Path(__file__).resolve().parents[2]).encode()
    assert [path for path in texts if home in path.read_bytes()] == []


@pytest.mark.parametrize("place", [ODD, MOVED])
def test_libraries(bare: Bare, bundle: Path, place: str) -> None:
    """The loader finds whatever any library needs, in the bundle or in the C library."""
    with bare.lying(bundle, place) as lying:
        files = {path: f"/{path.relative_to(bare.root)}" for path in lying.rglob("*") if is_loaded(path, lying)}
        folder_of = {path.name: os.path.dirname(inside) for path, inside in files.items()}
        for inside in sorted(files.values()):
            for found in libraries(bare, inside, f"{place}/lib", folder_of):
                assert found.startswith((f"{place}/", "/lib/", "/lib64/", "/usr/lib/")), (inside, found)
    print(f"\n{len(files)} libraries and programs")
    assert len(files) > 300


def test_eager_at_an_odd_place(bare: Bare, at_an_odd_place: str) -> None:
    with server(bare, at_an_odd_place) as backend:
        load(backend, "scripted")
        check_script(backend)
        assert "VLLM_CPU_OMP_THREADS_BIND=" in backend.stderr
        assert "for the KV cache" in backend.stderr
        assert "cannot be preloaded" not in backend.stderr
        maps = [Path(f"/proc/{process.pid}/maps") for process in backend.processes()]
        mapped = [path.read_text(encoding="utf-8").split() for path in maps]
    engines = [{word for word in words if ".so" in word} for words in mapped if any("libtorch_cpu" in w for w in words)]
    assert len(engines) > 1
    for libraries in engines:
        # sentencepiece brings one under a name of its own, which nothing else is linked with.
        (gomp,) = (each for each in libraries if "libgomp" in each and "sentencepiece" not in each)
        assert gomp.endswith("torch/lib/libgomp.so.1")
        assert any("tcmalloc" in each for each in libraries)


def test_compiled_at_an_odd_place(bare: Bare, at_an_odd_place: str) -> None:
    with server(bare, at_an_odd_place) as backend:
        load(backend, "scripted", EngineArgs='{"enforce_eager": false}')
        check_script(backend)
    compiled = list((bare.root / "tmp").rglob("*.so"))
    print(f"\ninductor compiled {len(compiled)} libraries")
    assert len(compiled) > 1


def test_a_real_model_after_a_move(bare: Bare, moved: str) -> None:
    with server(bare, moved) as backend:
        load(backend, "smollm2", EngineArgs='{"max_model_len": 1024}')
        check_paris(backend)


def test_compiled_after_a_move(bare: Bare, moved: str) -> None:
    (bare.root / "tmp/moved").mkdir()
    (bare.root / "tmp/moved").chmod(0o1777)
    with server(bare, moved, TMPDIR="/tmp/moved") as backend:
        load(backend, "smollm2", EngineArgs='{"max_model_len": 1024, "enforce_eager": false}')
        check_paris(backend)


def test_a_follower(bare: Bare, moved: str) -> None:
    """run.sh serve too works where there is nothing; the head's own line starts it."""
    topology = options(
        Path("/models/scripted"),
        data_parallel_size=2,
        data_parallel_size_local=1,
        data_parallel_address="127.0.0.1",
        data_parallel_rpc_port=free_port(),
    )
    with server(bare, moved, VLLM_CPU_KVCACHE_SPACE="1", OMP_NUM_THREADS="1") as backend:
        backend.wait_for_health(PORT_SECONDS)
        loading = in_background(backend, topology)
        (words,) = waits(backend, loading)
        program, *argv = bare.argv(moved, *words, PATH="", VLLM_CPU_KVCACHE_SPACE="1", OMP_NUM_THREADS="1")
        with Backend(run_sh=program, argv=argv, addr="", cwd=Path("/")) as follower:
            result = loading.result(300)
            assert result.success, f"{result.message}\n{follower.stderr[-4000:]}"
            for rank in (0, 1):
                assert answers(backend, rank) == expected()


def test_by_a_linked_folder(bare: Bare, moved: str) -> None:
    link = bare.root / "linked"
    link.symlink_to(MOVED)
    done = bare.run("/linked/run.sh", "--version")
    assert done.returncode == 0, done.stderr
    assert "vllm-grpc-backend" in done.stdout


def test_what_the_user_sets_stays(bare: Bare, moved: str) -> None:
    code = "import os; print(os.environ['LD_LIBRARY_PATH'], os.environ['LD_PRELOAD'], os.environ['CXX'])"
    given = {"LD_LIBRARY_PATH": "/mine", "LD_PRELOAD": "", "CXX": "clang++"}
    script = f'set --; here={MOVED}; . "$here/lib/environment.sh"; exec "$python" -c "{code}"'
    done = bare.run("/bin/sh", "-c", script, **given)
    assert done.stdout.split() == [f"/mine:{MOVED}/lib", "clang++"], done.stderr
