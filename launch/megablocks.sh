#!/usr/bin/env bash
# Install MegaBlocks, for model.moe.backend=megablocks, with the installed torch: it pins an older one, so pip must not
# install its dependencies. PYTHON names the interpreter of the environment (default: .venv/bin/python).
#   bash launch/megablocks.sh                   with its CUDA extension where that compiles
#   EXTENSION=no bash launch/megablocks.sh      without it: PyTorch is used instead
#   GROUPED_GEMM=1 bash launch/megablocks.sh    and grouped_gemm, on a machine with an NVIDIA GPU
# The versions are those of constraints.txt; a package that is installed in this version is left alone.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-.venv/bin/python}"
# Without pip's cache: a cached wheel may be built for another torch, or without the extension.
install=("$python" -m pip install --quiet --no-deps --no-build-isolation --no-cache-dir --force-reinstall)

fail() {
    printf 'launch/megablocks.sh: %s\n' "$*" >&2
    exit 2
}

say() {
    printf 'launch/megablocks.sh: %s\n' "$*"
}

version_of() {
    sed -n "s/^$1==//p" constraints.txt
}

is_installed() {
    "$python" -c 'import importlib.metadata, sys; sys.exit(importlib.metadata.version(sys.argv[1]) != sys.argv[2])' \
        "$1" "$(version_of "$1")" 2>/dev/null
}

# Print works, broken (compiled for another torch), or absent.
state_of() {
    "$python" -c 'if True:
        import importlib.util, sys
        if importlib.util.find_spec(sys.argv[1]) is None:
            sys.exit(print("absent"))
        try:
            # Its libraries first.
            import torch
            __import__(sys.argv[1])
        except ImportError:
            sys.exit(print("broken"))
        print("works")' "$1"
}

# Print the CUDA version of torch, the path of nvcc, and whether there is a GPU, as three words.
examine() {
    "$python" -c 'if True:
        import os, torch
        from torch.utils.cpp_extension import CUDA_HOME
        nvcc = os.path.join(CUDA_HOME or "", "bin", "nvcc")
        print(torch.version.cuda or "none", nvcc if os.access(nvcc, os.X_OK) else "none", torch.cuda.is_available())'
}

why_no_extension() {
    if [[ "${EXTENSION:-auto}" == no ]]; then
        echo "EXTENSION=no"
    elif [[ "$cuda" == none ]]; then
        echo "torch is a CPU build"
    elif [[ "${cuda%%.*}" -ge 13 ]]; then
        echo "it does not compile with CUDA 13 or newer, and torch is built for CUDA $cuda"
    elif [[ "$nvcc" == none ]]; then
        echo "there is no nvcc; install the CUDA $cuda toolkit, or name its folder: CUDA_HOME=/path"
    fi
}

need_build_tools() {
    "$python" -c 'import setuptools, sys; sys.exit(int(setuptools.__version__.split(".")[0]) < 71)' 2>/dev/null ||
        fail "the build needs setuptools 71 or newer; $python -m pip install 'setuptools>=71'"
}

# Its setup.py always compiles if it finds CUDA, and has no switch.
install_without_extension() {
    local folder
    folder="$(mktemp -d)"
    # Expanded now: the function's variable is gone when the script ends.
    # shellcheck disable=SC2064
    trap "rm -rf -- '$folder'" EXIT
    "$python" -m pip download --quiet --no-deps --no-build-isolation --no-cache-dir --no-binary :all: \
        --dest "$folder" "megablocks==$(version_of megablocks)"
    "$python" -m tarfile -e "$folder"/megablocks-*.tar.gz "$folder"
    sed -i "s/^if 'cu' in torch.__version__ and CUDA_HOME is not None:$/if False:/" "$folder"/megablocks-*/setup.py
    grep -q '^if False:' "$folder"/megablocks-*/setup.py ||
        fail "megablocks $(version_of megablocks) has another setup.py than this script knows"
    "${install[@]}" "$folder"/megablocks-*/
}

facts="$(examine)" || fail "$python has no torch that can be imported; PYTHON=/path/to/python names one that has"
read -r cuda nvcc has_gpu <<<"$facts"
# Without a GPU to determine the architecture, compile for Ampere and Hopper.
[[ "$has_gpu" == True ]] || export TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-8.0;9.0}"
reason="$(why_no_extension)"
extension="$(state_of megablocks_ops)"

if ! is_installed stanford-stk; then
    need_build_tools
    "${install[@]}" "stanford-stk==$(version_of stanford-stk)"
fi
if is_installed megablocks && [[ "$extension" == works || ("$extension" == absent && -n "$reason") ]]; then
    say "megablocks $(version_of megablocks) was installed already"
else
    need_build_tools
    if [[ -n "$reason" ]]; then
        install_without_extension
    else
        say "compiling the CUDA extension of megablocks; this takes minutes"
        "${install[@]}" --no-binary megablocks "megablocks==$(version_of megablocks)"
        [[ "$(state_of megablocks_ops)" == works ]] ||
            fail "the CUDA extension was not compiled; EXTENSION=no installs megablocks without it"
    fi
    say "installed megablocks $(version_of megablocks)"
fi
if [[ "$(state_of megablocks_ops)" == works ]]; then
    say "its CUDA extension is installed"
else
    say "its CUDA extension is not installed ($reason): PyTorch is used instead"
fi

if [[ "${GROUPED_GEMM:-0}" == 1 ]] && ! { is_installed grouped_gemm && [[ "$(state_of grouped_gemm)" == works ]]; }; then
    [[ "$has_gpu" == True && "$nvcc" != none ]] ||
        fail "GROUPED_GEMM=1 needs an NVIDIA GPU and nvcc; without grouped_gemm torch's grouped product multiplies"
    need_build_tools
    say "compiling grouped_gemm; this takes minutes"
    "${install[@]}" "grouped_gemm==$(version_of grouped_gemm)"
fi
if [[ "$(state_of grouped_gemm)" == works ]]; then
    say "grouped_gemm multiplies bf16 rows"
else
    say "torch's grouped product multiplies (GROUPED_GEMM=1 builds grouped_gemm where there is an NVIDIA GPU)"
fi
