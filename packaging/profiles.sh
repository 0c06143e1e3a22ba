# shellcheck shell=bash
# The profiles of pyproject.toml, which of them suits this machine, and why one can't be installed here. Sourced by
# install.sh and lock.sh in the root of the repository; all of it only reads. Needs coreutils, grep and awk.

# The root that /proc, /sys, /dev, /etc and /opt are looked up under: a folder in tests.
machine_root=${BACKEND_MACHINE_ROOT-}
elsewhere_hint='to install for another machine: --elsewhere'

fail() { echo "${0##*/}: $*" >&2; exit 1; }

profiles() { sed -n 's/^\[tool\.backend\.profiles\.\(.*\)\]$/\1/p' pyproject.toml; }

# profile_value PROFILE KEY: what pyproject.toml says, a line for each element of a list, nothing where it is not set.
profile_value() {
    awk -v table="[tool.backend.profiles.$1]" -v key="$2" '
        /^\[/ { inside = $0 == table }
        inside && $1 == key && $2 == "=" {
            sub(/^[^=]*= *\[?"/, ""); sub(/"\]? *$/, ""); gsub(/", *"/, "\n"); print
        }' pyproject.toml
}

# detect_profile: sets `profile` and `why`.
# shellcheck disable=SC2034 # for whoever sources this
detect_profile() {
    local driver
    driver=$(nvidia_driver)
    if [ -e "$machine_root/etc/nv_tegra_release" ]; then
        profile=l4t why='a Jetson: /etc/nv_tegra_release is there'
    elif [ -n "$driver" ]; then
        profile=cuda12
        if at_least "$driver" "$(profile_value cuda13 driver)"; then profile=cuda13; fi
        why="NVIDIA driver $driver was found"
    elif [ -e "$machine_root/dev/nvidiactl" ]; then
        fail "an NVIDIA GPU is here, but nvidia-smi does not say which driver; for the CPU: ./install.sh cpu"
    elif [ -e "$machine_root/dev/kfd" ]; then
        profile=rocm why='an AMD GPU: /dev/kfd is there'
    elif render=$(render_node 0x8086 discrete); then
        profile=xpu why="a graphics card by Intel: $render"
    else
        profile=cpu why='no GPU driver was found'
    fi
}

# check_build PROFILE PYTHON: whether its wheels can be installed and start here at all.
check_build() {
    local machine glibc needed
    machine=$(uname -m)
    grep -qx "$machine" <<<"$(profile_value "$1" machines)" ||
        fail "$1 is for $(profile_value "$1" machines | join_or), this machine is $machine"
    grep -qx "$2" <<<"$(profile_value "$1" python)" ||
        fail "$1 has wheels for Python $(profile_value "$1" python | sort -V | join_or), not for $2${PYTHON_VERSION:+ (PYTHON_VERSION)}"
    glibc=$(getconf GNU_LIBC_VERSION 2>/dev/null || ldd --version 2>/dev/null | sed -n 1p) ||
        fail "$1 needs glibc, which this system does not use"
    glibc=${glibc##* } needed=$(profile_value "$1" glibc)
    at_least "$glibc" "$needed" || fail "$1 has wheels for glibc $needed or newer, this system has $glibc"
}

# check_machine PROFILE: whether what is installed could run here: CPU and drivers.
check_machine() {
    local needed found
    needed=$(profile_value "$1" cpu-flag)
    if [ -n "$needed" ] && [ "$(uname -m)" = x86_64 ]; then
        grep -qw "$needed" "$machine_root/proc/cpuinfo" ||
            fail "$1 needs a CPU with ${needed^^}, and /proc/cpuinfo does not list it ($elsewhere_hint)"
    fi
    needed=$(profile_value "$1" driver)
    if [ -n "$needed" ]; then
        found=$(nvidia_driver)
        [ -n "$found" ] || fail "$1 needs the NVIDIA driver $needed or newer, and none answers here ($elsewhere_hint)"
        at_least "$found" "$needed" ||
            fail "$1 needs the NVIDIA driver $needed or newer, this is $found; update it$(older_cuda "$1" "$found") ($elsewhere_hint)"
    fi
    needed=$(profile_value "$1" rocm)
    if [ -n "$needed" ]; then
        [ -e "$machine_root/dev/kfd" ] || fail "$1 needs an AMD GPU, and /dev/kfd is not there ($elsewhere_hint)"
        found=$(cat "$machine_root/opt/rocm/.info/version" 2>/dev/null) ||
            fail "$1 needs ROCm $needed or newer in /opt/rocm, and there is none ($elsewhere_hint)"
        at_least "$found" "$needed" || fail "$1 needs ROCm $needed or newer, /opt/rocm has $found ($elsewhere_hint)"
    fi
    needed=$(profile_value "$1" render)
    if [ -n "$needed" ]; then
        render_node "$needed" >/dev/null ||
            fail "$1 needs a GPU by Intel with its driver, and no /dev/dri/render* is one ($elsewhere_hint)"
    fi
    needed=$(profile_value "$1" l4t)
    if [ -n "$needed" ]; then
        found=$(sed -n '1s/^# R\([0-9]*\).*/\1/p' "$machine_root/etc/nv_tegra_release" 2>/dev/null) ||
            fail "$1 needs a Jetson, and /etc/nv_tegra_release is not there ($elsewhere_hint)"
        at_least "$found" "$needed" ||
            fail "$1 needs Jetson Linux $needed (JetPack 7) or newer, this is ${found:-unknown} ($elsewhere_hint)"
    fi
}

# check_disk PROFILE: room in this folder, which uv's cache shares where it can.
check_disk() {
    local needed free
    needed=$(profile_value "$1" disk) free=$(free_gib)
    [ "$free" -ge "$needed" ] || fail "$1 needs $needed GiB of free disk, $PWD has $free"
}

free_gib() { df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }'; }

# at_least VERSION NEEDED
at_least() { [ "$(printf '%s\n' "$1" "$2" | sort -V | sed -n 1p)" = "$2" ]; }

join_or() { awk '{ line = line (NR > 1 ? " or " : "") $0 } END { print line }'; }

nvidia_driver() {
    local line
    line=$(grep -m 1 'NVRM version' "$machine_root/proc/driver/nvidia/version" 2>/dev/null ||
        nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null || true)
    grep -oE '[0-9]{3,}\.[0-9.]+' <<<"$line" | sed -n 1p || true
}

# older_cuda PROFILE DRIVER: the profile that this driver does serve, as the end of a sentence.
older_cuda() {
    if [ "$1" = cuda13 ] && at_least "$2" "$(profile_value cuda12 driver)"; then echo ', or take cuda12'; fi
}

# render_node VENDOR [discrete]: the first such GPU's folder in /sys. An integrated one is always PCI device 00:02.0.
render_node() {
    local node
    for node in "$machine_root"/sys/class/drm/renderD*/device; do
        [ "$(cat "$node/vendor" 2>/dev/null)" = "$1" ] || continue
        [ "${2-}" = discrete ] && [[ $(readlink -f -- "$node") == */0000:00:02.0 ]] && continue
        echo "${node#"$machine_root"}"
        return
    done
    return 1
}

# find_torch_wheel: sets `find_links` (uv's arguments) and `torch_wheel` (a path, or empty). Folders of wheels are known
# to pip or uv; uv reads only UV_FIND_LINKS (comma-separated), so pip's (space-separated) are passed on.
find_torch_wheel() {
    local folders folder wheel
    if [ -n "${UV_FIND_LINKS-}" ]; then
        IFS=, read -ra folders <<<"$UV_FIND_LINKS"
    else
        IFS=' ' read -ra folders <<<"${PIP_FIND_LINKS-$(python3 -m pip config get global.find-links 2>/dev/null || true)}"
    fi
    find_links=() torch_wheel=''
    for folder in "${folders[@]}"; do
        find_links+=(--find-links "$folder")
        for wheel in "$folder"/torch-*.whl; do
            if [ -e "$wheel" ]; then torch_wheel=$wheel; fi
        done
    done
}
