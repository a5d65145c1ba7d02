# shellcheck shell=bash
# Sourced by the other scripts, or run alone: creates the environment of the project once and reuses it while it is up to
# date.
#
# Afterwards the working directory is the repository, $python the environment's interpreter, $CXX the C++ compiler, and
# .venv/bin is first in PATH.

# Here too, because this file is also run alone: after an installation that failed, the environment must not look finished.
set -euo pipefail

repository="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"

fail() {
    printf '%s\n' "$*" >&2
    exit 2
}

# Find the interpreter behind a link, shim, or virtual environment, so that .venv never depends on itself.
base_python() {
    "$1" -c 'import sys; print(sys._base_executable) if sys.version_info >= (3, 11) else sys.exit(1)' 2>/dev/null
}

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.11 python3.12 python3.13 python3.14 python; do
        base_python "$candidate" && return
    done
    fail "Python 3.11 or newer is needed; python3 is $(python3 --version 2>/dev/null || echo 'not in PATH'):" \
        "install one, or name it: PYTHON=/path/to/python3.11 bash $0"
}

find_compiler() {
    local candidate
    for candidate in ${CXX:+"$CXX"} c++ g++ clang++; do
        command -v -- "$candidate" && return
    done
    fail "A C++ compiler is needed (DeepSpeed compiles one operation at first use); none of ${CXX:+$CXX, }c++, g++," \
        "clang++ is in PATH: install one (Debian, Ubuntu: apt install g++), or name it: CXX=/path/to/g++ bash $0"
}

check_python_parts() {
    local headers
    "$1" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$1 cannot create virtual environments: install the missing part (Debian, Ubuntu: apt install python3-venv)"
    headers="$("$1" -c 'import sysconfig; print(sysconfig.get_path("include"))')"
    [[ -f "$headers/Python.h" ]] ||
        fail "$1 has no $headers/Python.h, which C++ code for it needs (Debian, Ubuntu: apt install python3-dev)"
}

# If the path contains a space, .venv is created and used through a link without one: neither the first line of a script
# nor the -L option that torch passes to the linker can contain such a path.
environment_path() {
    local folder name
    if [[ "$repository" != *[[:space:]]* ]]; then
        echo "$repository/.venv"
        return
    fi
    name="repository-$(cksum <<<"$repository" | cut -d ' ' -f 1)"
    for folder in "${XDG_CACHE_HOME:-$HOME/.cache}/qsparse_moe" "/var/tmp/qsparse_moe-$UID"; do
        if [[ "$folder" != *[[:space:]]* ]] && mkdir -p -- "$folder" && ln -sfn -- "$repository" "$folder/$name"; then
            echo "$folder/$name/.venv"
            return
        fi
    done
    fail "$repository has a space in its path, and no link without one can be written to $folder:" \
        "move the repository, or name a folder that can be written: XDG_CACHE_HOME=/path bash $0"
}

# A hash of the requirements, and the folder: an editable install depends on its full path.
wanted_stamp() {
    "$1" -c 'if True:
        import hashlib, pathlib
        asked = b"".join(pathlib.Path(name).read_bytes() for name in ("pyproject.toml", "constraints.txt"))
        print(hashlib.sha256(asked).hexdigest(), pathlib.Path.cwd())'
}

set_up() {
    local base stamp written=""
    base="$(find_python)"
    CXX="$(find_compiler)"
    environment="$(environment_path)"
    python="$environment/bin/python"
    stamp="$(wanted_stamp "$base")"
    if [[ -f "$environment/made-for.txt" ]]; then
        written="$(<"$environment/made-for.txt")"
    fi
    if ! base_python "$python" >/dev/null || [[ "${written#* }" != "$repository" && -n "$written" ]]; then
        check_python_parts "$base"
        "$base" -m venv --clear "$environment"
        written=""
    fi
    if [[ "$written" != "$stamp" ]]; then
        echo "Setting up .venv in $repository; this takes a few minutes, once" >&2
        # torch first and pinned: pip downloads several gigabytes to resolve an open range.
        "$python" -m pip install --quiet --constraint constraints.txt torch
        "$python" -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
        printf '%s\n' "$stamp" >"$environment/made-for.txt"
    fi
    # Extensions are stored with the environment: two checkouts that share a folder would rebuild them in turns.
    export CXX PATH="$environment/bin:$PATH" TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$environment/extensions}"
}

free_port() {
    "$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# The ranks of the launcher share the cores of the machine.
threads_per_rank() {
    "$python" -c 'if True:
        import os, sys
        num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        print(max(1, num_cores // int(sys.argv[1])))' "$1"
}

cd -- "$repository" || exit
set_up
