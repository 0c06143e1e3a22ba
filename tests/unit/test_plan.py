"""`run.sh plan`: flags, the table, the JSON, and what it says where nothing can be planned."""

import json
import re
import shlex
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from backend import plan
from tests.models import ensure
from tests.unit.test_model_shape import DEEPSEEK_V3, LLAMA_70B

ROOT = Path(__file__).parents[2]
# A 70B model, its weights but a header.
TENSORS = {
    "model.embed_tokens.weight": [128256, 8192],
    **{f"model.layers.{layer}.everything": [855_000_000] for layer in range(80)},
    "lm_head.weight": [128256, 8192],
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llama 70b")
    (folder / "config.json").write_text(json.dumps(LLAMA_70B), encoding="utf-8")
    header, end = {}, 0
    for name, shape in TENSORS.items():
        begin, end = end, end + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)  # none of it on the disk
    return str(folder)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = plan.main(words)
    output, errors = capsys.readouterr()
    return status, output, errors


def as_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    status, output, errors = run(capsys, *words, "--json")
    assert (status, errors) == (0, "")
    found: dict[str, Any] = json.loads(output)
    return found


TWO = ("--nodes", "2", "--gpus-per-node", "8", "--gpu-memory", "80GiB", "--max-model-len", "8192")


def test_a_large_model_on_two_machines(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, output, errors = run(capsys, llama, *TWO, "--head", "10.0.0.1")
    assert (status, errors) == (0, "")
    lines = output.splitlines()
    assert lines[0].endswith("LlamaForCausalLM, 80 layers, 64 heads, 8 KV heads")
    assert lines[1].split()[1:] == ["131.3", "GiB,", "bfloat16"]
    assert "2 of 8 GPUs with 80.0 GiB, of which 71.6 GiB are for weights" in lines[3]
    (chosen,) = [line for line in lines if line.startswith("*")]
    assert chosen.split() == ["*", "4", "1", "4", "2", "32.8", "GiB", "38.8", "GiB", "62.0"]
    args = json.loads(lines[lines.index("LoadModel on the head, EngineArgs:") + 1])
    assert args == {
        "tensor_parallel_size": 4,
        "data_parallel_size": 4,
        "data_parallel_size_local": 2,
        "data_parallel_address": "10.0.0.1",
        "data_parallel_rpc_port": 29550,
        "max_model_len": 8192,
    }
    worker = lines[lines.index("on the other machines, supervised:") + 1]
    assert shlex.split(worker) == [
        *("run.sh", "worker", llama, "--data-parallel-size", "4", "--data-parallel-size-local", "2"),
        *("--start-rank", "2", "--master-addr", "10.0.0.1", "--master-port", "29550"),
        *("--vllm-arg=--tensor-parallel-size", "--vllm-arg=4", "--vllm-arg=--max-model-len", "--vllm-arg=8192"),
    ]
    assert lines[lines.index("or as vLLM alone does it:") + 1].startswith("  run.sh serve ")


def test_json_has_the_same(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, llama, *TWO)
    assert found["layout"] == {
        "tensor": 4, "pipeline": 1, "data": 4, "local": 2, "nodes": 1, "experts": False
    }  # fmt: skip
    assert found["engine_args"]["data_parallel_address"] == "HEAD"
    assert len(found["followers"]) == 1
    assert found["followers"][0]["serve"][:4] == ["run.sh", "serve", llama, "--headless"]
    assert found["requests_per_rank"] == pytest.approx(62.0, abs=0.1)
    assert found["notes"] == found["ray"] == []


@pytest.mark.parametrize(
    ("words", "layout"),
    [
        (("--latency",), (8, 1, 2)),
        (("--tensor-parallel-size", "2"), (2, 4, 2)),
        (("--pipeline-parallel-size", "2", "--data-parallel-size", "1"), (8, 2, 1)),
        (("--tensor-parallel-size", "16"), (16, 1, 1)),
        (("--overhead", "30GiB"), (8, 1, 2)),
        (("--gpu-memory-utilization", ".5"), (8, 1, 2)),
        (("--kv-cache-dtype", "fp8"), (4, 1, 4)),
        (("--dtype", "float32"), (8, 1, 2)),
    ],
)
def test_what_changes_the_choice(
    llama: str, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], layout: tuple[int, int, int]
) -> None:
    found = as_json(capsys, llama, *TWO, *words)
    assert (found["layout"]["tensor"], found["layout"]["pipeline"], found["layout"]["data"]) == layout


def test_what_is_asked_for_is_passed_on(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--gpu-memory-utilization", "0.9", "--kv-cache-dtype", "fp8", "--dtype", "float16", "--trust-remote-code")
    found = as_json(capsys, llama, *TWO, *words, "--port", "31000")
    wanted = {"gpu_memory_utilization": 0.9, "kv_cache_dtype": "fp8", "dtype": "float16", "trust_remote_code": True}
    assert found["engine_args"].items() >= {**wanted, "data_parallel_rpc_port": 31000}.items()
    serve = " ".join(found["followers"][0]["serve"])
    assert "--data-parallel-rpc-port 31000" in serve
    assert "--gpu-memory-utilization 0.9" in serve
    assert serve.endswith("--trust-remote-code") or "--trust-remote-code --" in serve


def test_half_the_bytes_hold_twice_the_requests(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    plain, small = as_json(capsys, llama, *TWO), as_json(capsys, llama, *TWO, "--kv-cache-dtype", "fp8")
    assert small["requests_per_rank"] == pytest.approx(2 * plain["requests_per_rank"], rel=0.01)


@pytest.mark.parametrize(
    ("words", "note"),
    [
        (("--nodes", "3", "--gpus-per-node", "1", "--pipeline-parallel-size", "2"), "1 of the machines are not used"),
        (("--nodes", "4", "--gpus-per-node", "1", "--pipeline-parallel-size", "2"), "make 2 such groups"),
        (("--nodes", "2", "--gpus-per-node", "1"), "vLLM refuses a pipeline"),
        (("--nodes", "2", "--gpus-per-node", "1", "--tensor-parallel-size", "2"), "needs InfiniBand"),
        (("--gpus-per-node", "6"), "2 GPUs of each machine are not used"),
        (("--gpus-per-node", "2"), "little is left for the KV cache"),
    ],
)
def test_notes(llama: str, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], note: str) -> None:
    found = as_json(capsys, llama, "--gpu-memory", "80GiB", "--max-model-len", "8192", *words)
    assert [each for each in found["notes"] if note in each]


def test_many_machines_have_few_rows(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--nodes", "1024", "--gpus-per-node", "8", "--gpu-memory", "80GiB")
    status, output, _ = run(capsys, llama, *words, "--max-model-len", "8192")
    assert status == 0
    table = output.partition("\n\n")[2].partition("\n\n")[0].splitlines()
    assert len(table) < 20
    assert table[-1].strip() == "…"
    assert run(capsys, llama, *words, "--max-model-len", "8192", "--overhead", "74GiB")[0] == 1


def test_ray_has_no_followers(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, llama, *TWO, "--ray", "--head", "10.0.0.1")
    assert found["followers"] == []
    assert found["engine_args"]["data_parallel_backend"] == "ray"
    assert found["ray"][1] == ["ray", "start", "--address=10.0.0.1:6379", "--block"]
    _, output, _ = run(capsys, llama, *TWO, "--ray")
    assert "Ray first" in output
    assert "run.sh worker" not in output


def test_experts_are_spread_or_counted_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V3), encoding="utf-8")
    index = {"metadata": {"total_size": 600 << 30}, "weight_map": {"a": "not-here.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    found = as_json(capsys, str(tmp_path), "--nodes", "2", "--gpus-per-node", "8", "--gpu-memory", "141GiB")
    assert found["layout"]["tensor"] == 8
    assert found["engine_args"]["enable_expert_parallel"] is True
    assert any("only the size of the files is known" in note for note in found["notes"])
    assert any("run in step" in note for note in found["notes"])


def test_a_small_model_needs_one_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, str(ensure("scripted")), "--gpu-memory", "8GiB")
    assert found["engine_args"] == {}
    assert found["followers"] == []


def test_a_model_that_does_not_fit(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, output, errors = run(capsys, llama, "--gpu-memory", "24GiB", "--gpus-per-node", "4")
    assert (status, output) == (1, "")
    assert errors.startswith(
        f"plan: {llama} does not fit: the weights take 32.8 GiB of a GPU, of which 20.1 are usable"
    )
    assert re.search(r"; \d+ machines of this kind would do\n$", errors)


def test_a_context_that_does_not_fit(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--gpu-memory", "80GiB", "--gpus-per-node", "2")
    status, _, errors = run(capsys, llama, *words)
    assert status == 1
    shorter = errors.partition("--max-model-len ")[2].partition(" ")[0]
    assert run(capsys, llama, *words, "--max-model-len", shorter)[0] == 0


def test_a_model_that_cannot_be_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, output, errors = run(capsys, str(tmp_path), "--gpu-memory", "8GiB")
    assert (status, output) == (1, "")
    assert errors.startswith(f"plan: {tmp_path}: no config.json that can be read")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ((), "the following arguments are required: MODEL, --gpu-memory"),
        (("m",), "the following arguments are required: --gpu-memory"),
        (("m", "--gpu-memory", "80"), "is no size; use a number with GiB, GB or MiB"),
        (("m", "--gpu-memory", "0GiB"), "is no size"),
        (("m", "--gpu-memory", "-8GiB"), "expected one argument"),
        (("m", "--gpu-memory", "8GiB", "--nodes", "0"), "'0': use a whole number from 1 to 1024"),
        (("m", "--gpu-memory", "8GiB", "--gpus-per-node", "1.5"), "use a whole number"),
        (("m", "--gpu-memory", "8GiB", "--port", "65536"), "use a whole number from 1 to 65535"),
        (("m", "--gpu-memory", "8GiB", "--gpu-memory-utilization", "1.2"), "use a number above 0 and at most 1"),
        (("m", "--gpu-memory", "8GiB", "--gpu-memory-utilization", "0.0"), "use a number above 0 and at most 1"),
        (("m", "--gpu-memory", "8GiB", "--dtype", "int8"), "invalid choice"),
        (("m", "--gpu-memory", "8GiB", "--node", "2"), "unrecognized arguments"),
    ],
)
def test_flags_that_cannot_be_used(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], problem: str) -> None:
    with pytest.raises(SystemExit) as caught:
        plan.main(words)
    assert caught.value.code == 2
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GiB", 80 << 30), ("80g", 80 << 30), ("24 GB", 24 * 10**9), ("0.5T", 1 << 39), ("512MiB", 512 << 20)],
)
def test_sizes(text: str, size: int) -> None:
    assert plan._size(text) == size


def test_it_is_a_command_of_run_sh(llama: str) -> None:
    done = subprocess.run(
        [str(ROOT / "run.sh"), "plan", llama, *TWO], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "\n*  4   1   4 " in done.stdout
    code = "import sys; sys.argv = ['', 'plan']; import common.planning; print([m for m in sys.modules if 'vllm' in m])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
