# shellcheck shell=bash
# FROM_SOURCE=true: vLLM built for this machine's CPU, or for Intel's GPUs. Sourced by install.sh after profiles.sh.

vllm_repository=https://github.com/vllm-project/vllm

# check_source PROFILE: whether its source and a compiler are at hand.
check_source() {
    local tag found
    tag=$(profile_value "$1" source)
    [ -n "$tag" ] || fail "FROM_SOURCE=true builds vLLM for cpu and for xpu, not for $1"
    if [ "$1" = cpu ]; then
        found=$("${CXX:-g++}" -dumpfullversion 2>/dev/null) ||
            fail 'FROM_SOURCE=true needs g++ 12.3 or newer, and there is none; CXX can name it'
        at_least "$found" 12.3 || fail "FROM_SOURCE=true needs g++ 12.3 or newer, ${CXX:-g++} is $found; CXX can name another"
    fi
    if [ -n "${VLLM_SOURCE-}" ]; then
        [ -e "$VLLM_SOURCE/requirements/$1.txt" ] || fail "VLLM_SOURCE=$VLLM_SOURCE is not the source of vLLM"
    else
        command -v git >/dev/null || fail "FROM_SOURCE=true needs git to fetch vLLM's source; VLLM_SOURCE can name a folder with it"
        GIT_TERMINAL_PROMPT=0 timeout 60 git ls-remote --exit-code "$vllm_repository" "refs/tags/$tag" >/dev/null 2>&1 ||
            fail "FROM_SOURCE=true: $tag of $vllm_repository can't be reached; VLLM_SOURCE can name a folder with it"
    fi
}

# install_from_source UV PROFILE FOLDER ARGUMENTS_OF_UV...: as vLLM's documentation says, FOLDER is for its source.
install_from_source() {
    local uv=$1 profile=$2 source=${VLLM_SOURCE:-$3} build
    shift 3
    if [ -z "${VLLM_SOURCE-}" ]; then
        git clone --quiet --depth 1 --branch "$(profile_value "$profile" source)" "$vllm_repository" "$source"
    fi
    build=(-r "$source/requirements/$profile.txt")
    [ "$profile" = xpu ] || build+=(-r "$source/requirements/build/$profile.txt")
    "$uv" pip install -r pyproject.toml "${build[@]}" 'mistral-common[audio]' av scipy soundfile soxr "$@" ||
        fail "what vLLM's source asks for was not installed: uv's message is above"
    MAX_JOBS=${MAX_JOBS:-$(build_jobs)} VLLM_TARGET_DEVICE=$profile \
        "$uv" pip install --no-deps --no-build-isolation "$source" ||
        fail "vLLM could not be built from $source; the compiler's message is above"
}

# build_jobs: a compiler of vLLM's kernels takes up to 3 GiB.
build_jobs() {
    local kib limit jobs
    kib=$(awk '/^MemAvailable:/ { print $2 }' "$machine_root/proc/meminfo")
    limit=$(cat "$machine_root/sys/fs/cgroup/memory.max" 2>/dev/null || echo max)
    if [ "$limit" != max ] && [ $((limit / 1024)) -lt "$kib" ]; then kib=$((limit / 1024)); fi
    jobs=$((kib / 1048576 / 3))
    [ "$jobs" -le "$(nproc)" ] || jobs=$(nproc)
    echo $((jobs > 0 ? jobs : 1))
}
