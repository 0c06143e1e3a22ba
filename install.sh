#!/usr/bin/env bash
# Installs everything the backend needs into .venv beside this file. Safe to run again: it does only what is missing.
set -euo pipefail
usage() {
    cat <<'END'
usage: ./install.sh [PROFILE] [--extra NAME]... [--elsewhere] [--dry-run]

  PROFILE       cpu, cuda12, cuda13, rocm, xpu, l4t, or auto: what this machine has. Default: as installed, else auto
  --extra NAME  also install an extra of pyproject.toml: bench, channelz, demo, ray, test
  --elsewhere   what is installed will run on another machine: don't ask this one for a GPU, a driver or CPU features
  --dry-run     print the plan, or why it can't be; change nothing

Environment:
  PYTHON_VERSION                 the Python to use, such as 3.12; otherwise the profile's
  UV_FIND_LINKS, PIP_FIND_LINKS  a folder with a torch wheel, which the cpu profile takes instead of PyTorch's index
  UV                             the uv to use; otherwise the one on PATH, otherwise one is put into .uv
  FROM_SOURCE=true               cpu, xpu: build vLLM for this machine from its source; MAX_JOBS, CXX
END
}

here=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
cd -- "$here"
. packaging/profiles.sh
. packaging/from-source.sh

profile='' elsewhere='' dry_run='' extras=()
while [ $# -gt 0 ]; do
    case $1 in
    --extra) extras+=("${2:?"--extra needs a name"}"); shift 2 ;;
    --extra=*) extras+=("${1#*=}"); shift ;;
    --elsewhere) elsewhere=yes; shift ;;
    --dry-run) dry_run=yes; shift ;;
    -h | --help) usage; exit 0 ;;
    -*) usage >&2; fail "unknown argument: $1" ;;
    *) [ -z "$profile" ] || fail "one profile at a time: $profile or $1"; profile=$1; shift ;;
    esac
done

# Which profile, and why.
why='as asked' from_source=''
if [ -z "$profile" ] && { [ -e .venv/installed ] || [ -e .venv/changing ]; } && [ -e .venv/profile ]; then
    read -r profile from_source <.venv/profile
    why='as installed before'
fi
[ "${FROM_SOURCE-}" != true ] || from_source=true
if [ "${profile:-auto}" = auto ]; then
    detect_profile
elif ! grep -qx -- "$profile" <<<"$(profiles)"; then
    fail "no profile is called $profile: use auto, $(profiles | join_or)"
fi
# What .venv/profile says once it is in there.
record="$profile${from_source:+ $from_source}"
vllm_from='a wheel'
[ "$from_source" != true ] || vllm_from='its source'

# Which Python, and where torch comes from.
python=$(profile_value "$profile" python | sed -n 1p)
backend=$(profile_value "$profile" torch-backend)
source_args=() torch_from='the general index' torch_wheel=''
while read -r index; do source_args+=(--index "$index") torch_from=$index; done < <(profile_value "$profile" indexes)
strategy=$(profile_value "$profile" index-strategy)
[ -z "$strategy" ] || source_args+=(--index-strategy "$strategy")
if [ "$profile" = cpu ]; then find_torch_wheel; fi
if [ -n "$torch_wheel" ]; then
    # --torch-backend insists on PyTorch's index, so it must not be given beside a folder.
    source_args+=("${find_links[@]}" --overrides packaging/wheel-folder-overrides.txt)
    torch_from=$torch_wheel
    tag=${torch_wheel##*/torch-*-cp3}
    [ "$tag" = "$torch_wheel" ] || python=3.${tag%%-*}
elif [ -n "$backend" ]; then
    source_args+=(--torch-backend "$backend")
    torch_from="PyTorch's index ($backend)"
fi
# Images of Python set it, too, to a release such as 3.11.13.
if [[ ${PYTHON_VERSION-} =~ ^[0-9]+\.[0-9]+ ]]; then python=${BASH_REMATCH[0]}; else python=${PYTHON_VERSION:-$python}; fi

# The lock is for one Python on one machine; others take versions from vLLM's ranges and ours.
lock=packaging/locks/$profile.txt
locked="$lock, $(sed -n 's/^# Packages: //p' "$lock")"
if [ -z "$torch_wheel" ]; then locked+=$(sed -n 's/^# Not in it, .*: /; from ranges: /p' "$lock"); fi
if [ "$python" != "$(profile_value "$profile" python | sed -n 1p)" ] ||
    [ "$(uname -m)" != "$(profile_value "$profile" machines | sed -n 1p)" ]; then
    lock='' locked="none for Python $python on $(uname -m), versions from ranges"
fi

# Nothing to do when the last run came to its end with the same inputs, and had these extras or more.
stamp=$(
    cat pyproject.toml packaging/wheel-folder-overrides.txt proto/backend.proto ${lock:+"$lock"}
    echo "$profile" "$python" "$vllm_from" "${source_args[@]}"
)
stamp=$(sha256sum <<<"$stamp")
there=()
if [ -e .venv/installed ]; then mapfile -t there <.venv/installed; fi
[ "${there[0]-}" = "$stamp" ] || there=()
is_installed() {
    local extra
    [ -n "${there[0]-}" ] && [ -e common/pb/backend_pb2_grpc.py ] || return 1
    for extra in "${extras[@]}"; do [[ " ${there[*]:1} " = *" $extra "* ]] || return 1; done
}
to_do='install'
if is_installed; then to_do='nothing, it is installed'; fi

# Whatever speaks against it, before anything is downloaded.
if [ "$to_do" = install ] || [ -n "$dry_run" ]; then
    check_build "$profile" "$python"
    [ -n "$elsewhere" ] || check_machine "$profile"
    # What an environment of this profile still lacks is little.
    [ "$(cat .venv/profile 2>/dev/null)" = "$record" ] || check_disk "$profile"
    if [ "$from_source" = true ]; then check_source "$profile"; fi
fi
if [ -n "$dry_run" ]; then
    cat <<END
profile  $profile ($why)
Python   $python
vLLM     from $vllm_from$([ "$vllm_from" = 'a wheel' ] || echo ", MAX_JOBS=${MAX_JOBS:-$(build_jobs)}")
torch    from $torch_from
lock     $locked
extras   ${extras[*]:-none}
disk     $(profile_value "$profile" disk) GiB needed, $(free_gib) GiB free
to do    $to_do in $here/.venv
END
    exit 0
fi
echo "install.sh: $profile ($why), Python $python, vLLM from $vllm_from, torch from $torch_from, lock: $locked${extras[0]:+, extras: ${extras[*]}}"
[ "$to_do" = install ] || exit 0

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

# From here on it is not whole until the end.
if [ -e .venv/installed ]; then mv .venv/installed .venv/changing; fi

# Two profiles in one environment would overwrite each other's vLLM.
if [ ! -x .venv/bin/python ] || { [ -e .venv/profile ] && [ "$(<.venv/profile)" != "$record" ]; } ||
    [ "$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')" != "$python" ]; then
    "$uv" venv --quiet --clear --relocatable --python "$python" .venv ||
        fail "Python $python is neither here nor to be had by uv; $profile also takes: $(profile_value "$profile" python | tr '\n' ' ')(PYTHON_VERSION)"
fi
echo "$record" >.venv/profile
export VIRTUAL_ENV=$here/.venv

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
profile_value "$profile" overrides >"$work/overrides"
[ ! -s "$work/overrides" ] || source_args+=(--overrides "$work/overrides")
if [ -n "$lock" ]; then
    cp "$lock" "$work/lock"
    if [ -n "$torch_wheel" ] && ! grep -qF "$(sha256sum <"$torch_wheel" | cut -d ' ' -f 1)" "$lock"; then
        # A build of the user's own: its version is vLLM's to judge.
        awk '/^[^ #]/ { torch = /^torch==/ } !torch' "$lock" >"$work/lock"
    fi
    source_args+=(--constraints "$work/lock")
fi
if [ "$from_source" = true ]; then
    install_from_source "$uv" "$profile" "$work/vllm" "${extras[@]/#/--extra=}" "${source_args[@]}"
else
    "$uv" pip install -r pyproject.toml --extra "$profile" "${extras[@]/#/--extra=}" "${source_args[@]}" ||
        fail "$profile was not installed: uv's message is above. vLLM comes from $(profile_value "$profile" indexes | sed -n 1p | grep . || echo 'the general index'), torch from $torch_from, and nothing else was taken in their place"
fi
# For its entry points, by which vLLM finds our plugin; the code itself is found by run.sh's PYTHONPATH.
"$uv" pip install --quiet --no-deps --editable .
# Compiling at first import would take half a minute, with the interpreter's lock held under the server's feet.
.venv/bin/python -m compileall -q -j 0 .venv/lib >/dev/null 2>&1 || true

# The stubs, by the grpcio-tools that were resolved together with the installed protobuf runtime.
mkdir -p common/pb
.venv/bin/python -m grpc_tools.protoc -Icommon/pb=proto \
    --python_out=. --pyi_out=. --grpc_python_out=. common/pb/backend.proto
printf '%s\n' "$stamp" "${extras[@]}" "${there[@]:1}" >.venv/changing
mv .venv/changing .venv/installed
