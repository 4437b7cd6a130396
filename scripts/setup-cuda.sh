#!/bin/sh
# Fetches the CUDA compiler (NVRTC) and its headers by pip into .tools/cuda126, and with `setup-cuda.sh thor` those of
# CUDA 13.0 into .tools/cuda130 too, which alone knows Jetson Thor. `setup-cuda.sh tools` fetches nvcc of CUDA 13.0 instead,
# into .tools/nvcc130, for candor-tools with training on a GPU. No GPU, driver or CUDA toolkit is needed. Does
# nothing where they are there already.
set -eu
cd "$(dirname "$0")/.."

fail() {
    printf 'setup-cuda: %s\n' "$*" >&2
    exit 1
}

# The user's own pip, or one in a folder of its own.
pip() {
    if python3 -m pip --version >/dev/null 2>&1; then
        python3 -m pip "$@"
    else
        [ -x .tools/pip/bin/pip ] || python3 -m venv .tools/pip ||
            fail "python3 with pip or venv is needed (Debian, Ubuntu: apt-get install python3-venv)"
        .tools/pip/bin/pip "$@"
    fi
}

# fetch NAME: the packages of scripts/NAME.txt into .tools/NAME, which holds the list that it was made from.
fetch() {
    folder=.tools/$1
    list=scripts/$1.txt
    cmp -s "$list" "$folder/list.txt" && return
    echo "setup-cuda: fetching the compiler of $list into $folder"
    mkdir -p .tools
    part=$(mktemp -d ".tools/$1.XXXXXX")
    pip install --quiet --root-user-action ignore --disable-pip-version-check --no-deps --only-binary :all: \
        --require-hashes --target "$part" --requirement "$list" || {
        rm -rf "$part"
        fail "pip could not fetch them (its messages stand above); there are packages for Linux on x86-64 and 64-bit ARM"
    }
    # Nothing that a compilation reads.
    find "$part" \( -name '*.a' ! -name libcudart_static.a -o -name '*.alt.so*' -o -name '__pycache__' \) -prune -exec rm -rf {} +
    cp "$list" "$part/list.txt"
    chmod 755 "$part"
    rm -rf "$folder"
    mv "$part" "$folder"
    # Builds look for the compilers again when this folder has changed.
    touch -c kernels/cuda
}

case ${1-} in
"") fetch cuda126 ;;
thor)
    fetch cuda126
    fetch cuda130
    ;;
tools) fetch nvcc130 ;;
*) fail "what is \"$1\"? Only \"thor\" or \"tools\" may follow" ;;
esac
