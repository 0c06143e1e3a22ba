#!/usr/bin/env bash
# Installs everything the backend needs into .venv beside this file. Safe to run again: it does only what is missing.
set -euo pipefail
usage() {
    cat <<'EOF'
usage: ./install.sh [--torch-backend BACKEND] [--extra NAME]...

  --torch-backend BACKEND  where PyTorch comes from: auto (default), cpu, cu130, ... (uv's --torch-backend)
  --extra NAME             also install an extra of pyproject.toml: demo, test

Environment:
  UV_FIND_LINKS, PIP_FIND_LINKS  a folder with a torch wheel, taken instead of PyTorch's index
  UV                             the uv to use; otherwise the one on PATH, otherwise one is put into .uv
EOF
}
fail() { echo "install.sh: $*" >&2; exit 1; }

here=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
cd -- "$here"
torch_backend=''
extras=()
while [ $# -gt 0 ]; do
    case $1 in
    --torch-backend) torch_backend=${2:?"--torch-backend needs a value"}; shift 2 ;;
    --torch-backend=*) torch_backend=${1#*=}; shift ;;
    --extra) extras+=("${2:?"--extra needs a name"}"); shift 2 ;;
    --extra=*) extras+=("${1#*=}"); shift ;;
    -h | --help) usage; exit 0 ;;
    *) usage >&2; fail "unknown argument: $1" ;;
    esac
done

# Folders of wheels: uv reads only UV_FIND_LINKS (comma-separated), so pip's (space-separated) are passed on.
if [ -n "${UV_FIND_LINKS-}" ]; then
    IFS=, read -ra folders <<<"$UV_FIND_LINKS"
else
    IFS=' ' read -ra folders <<<"${PIP_FIND_LINKS-$(python3 -m pip config get global.find-links 2>/dev/null || true)}"
fi
torch_wheel=''
find_links=()
for folder in "${folders[@]}"; do
    find_links+=(--find-links "$folder")
    for wheel in "$folder"/torch-*.whl; do
        [ -e "$wheel" ] && torch_wheel=${wheel##*/}
    done
done

# The accelerator: what the machine has, or what --torch-backend says.
case ${torch_backend:-auto} in
cpu) accelerator=cpu why='--torch-backend cpu' ;;
cu*) accelerator=cuda why="--torch-backend $torch_backend" ;;
auto)
    if [ -e /dev/nvidiactl ] || command -v nvidia-smi >/dev/null 2>&1; then
        accelerator=cuda why='an NVIDIA driver was found'
    elif [ -e /dev/kfd ]; then
        fail 'an AMD GPU was found; its profile is not installed by this script yet. For the CPU: --torch-backend cpu'
    else
        accelerator=cpu why='no GPU driver was found'
    fi
    ;;
*) fail "--torch-backend $torch_backend: use auto, cpu or a CUDA version such as cu130" ;;
esac

source_args=()
if [ -n "$torch_wheel" ] && [ -z "$torch_backend" ] && [ "$accelerator" = cpu ]; then
    # --torch-backend insists on PyTorch's index, so it must not be given beside a folder.
    tag=${torch_wheel#torch-*-cp}
    python=3.${tag:1:2}
    python=${python%-}
    source_args=("${find_links[@]}" --overrides packaging/wheel-folder-overrides.txt)
    torch_from=$torch_wheel
else
    # The machine's own Python where vLLM has wheels for it, otherwise one that uv fetches.
    python=$(python3 -c 'import sys; v = sys.version_info[:2]; print("%d.%d" % v if (3, 11) <= v < (3, 15) else "3.12")' \
        2>/dev/null || echo 3.12)
    backend=$torch_backend
    if [ "${backend:-auto}" = auto ]; then
        backend=auto
        [ "$accelerator" = cpu ] && backend=cpu
    fi
    source_args=(--torch-backend "$backend")
    torch_from="PyTorch's index ($backend)"
fi
python=${PYTHON_VERSION:-$python}
echo "install.sh: $accelerator ($why), Python $python, torch from $torch_from${extras[0]:+, extras: ${extras[*]}}"

extra_args=(--extra "$accelerator")
for extra in "${extras[@]}"; do extra_args+=(--extra "$extra"); done

# Nothing to do when the last successful run had the same inputs; what was installed beyond them stays.
stamp=$(cat pyproject.toml packaging/wheel-folder-overrides.txt proto/backend.proto; echo "$python" "${source_args[@]}" "${extra_args[@]}")
stamp=$(sha256sum <<<"$stamp")
if grep -qxF "$stamp" .venv/installed 2>/dev/null && [ -e common/pb/backend_pb2_grpc.py ]; then
    exit 0
fi

uv=${UV-$(command -v uv || true)}
if [ -z "$uv" ]; then
    uv=$here/.uv/bin/uv
    if [ ! -x "$uv" ]; then
        if python3 -m venv .uv 2>/dev/null; then
            .uv/bin/python -m pip install --quiet --disable-pip-version-check uv
        elif command -v curl >/dev/null; then
            curl --proto '=https' -LsSf https://astral.sh/uv/install.sh |
                UV_INSTALL_DIR="$here/.uv/bin" UV_NO_MODIFY_PATH=1 sh >&2
        fi
        [ -x "$uv" ] || fail 'uv could not be installed: it needs python3 with venv and pip, or curl. Or set UV to a uv of yours'
    fi
fi
"$uv" --version >/dev/null || fail "$uv does not run"

if [ ! -x .venv/bin/python ] || [ "$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')" != "$python" ]; then
    "$uv" venv --quiet --clear --relocatable --python "$python" .venv
fi
VIRTUAL_ENV=$here/.venv "$uv" pip install -r pyproject.toml "${extra_args[@]}" "${source_args[@]}"
# For its entry points, by which vLLM finds our plugin; the code itself is found by run.sh's PYTHONPATH.
VIRTUAL_ENV=$here/.venv "$uv" pip install --quiet --no-deps --editable .
# Compiling at first import would take half a minute, with the interpreter's lock held under the server's feet.
.venv/bin/python -m compileall -q -j 0 .venv/lib >/dev/null 2>&1 || true

# The stubs, by the grpcio-tools that were resolved together with the installed protobuf runtime.
mkdir -p common/pb
.venv/bin/python -m grpc_tools.protoc -Icommon/pb=proto \
    --python_out=. --pyi_out=. --grpc_python_out=. common/pb/backend.proto
echo "$stamp" >>.venv/installed
