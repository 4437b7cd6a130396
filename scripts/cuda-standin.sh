#!/bin/sh
# Builds the stand-in for CUDA's driver library, which runs the kernels on the CPU:
#     cuda-standin.sh OUT_DIR [COMPILER FLAGS...]
# compiles the emulator, the stand-in and every kernel of kernels/cuda into OUT_DIR/libcuda.so.1 and prints that path.
# Put OUT_DIR first in LD_LIBRARY_PATH, or load the library by its path before anyone looks for the driver. Each file is
# compiled into one object, two at a time (CUDA_STANDIN_JOBS), and only if it, a header or a flag changed.
# CUDA_STANDIN_SOURCES names further .cu files; those of kernels/cuda with such a name are left out. Headers beside them come first for
# them. CUDA_STANDIN_OBJECTS is a folder for the objects, which several libraries can share (default: OUT_DIR).
# -DCUDA_HOST_ARCH=720 builds the kernels as for compute capability 7.2.
set -eu

fail() {
    printf 'cuda-standin: %s\n' "$*" >&2
    exit 1
}

[ $# -ge 1 ] || fail "usage: cuda-standin.sh OUT_DIR [COMPILER FLAGS...]"
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
mkdir -p "${CUDA_STANDIN_OBJECTS:=$out}"
objects_folder=$(cd "$CUDA_STANDIN_OBJECTS" && pwd)
cd "$(dirname "$0")/../kernels/cuda"
compiler=${CXX:-g++}
command -v "$compiler" >/dev/null ||
    fail "the C++ compiler $compiler was not found. Install g++ 12 or later (scripts/setup.sh does), or set CXX."

flags="-std=c++17 -O2 -g1 -fPIC -fvisibility=hidden -ffp-contract=off -fno-strict-aliasing -pthread -Wall -Wextra -Wno-unknown-pragmas"
# Thread-local variables of a library are found quickly only this way; 64-bit ARM always does so.
[ "$(uname -m)" != x86_64 ] || flags="$flags -mtls-dialect=gnu2"
# Half numbers and fused additions in one instruction each, where this computer has them.
features=$(grep -m 1 '^flags' /proc/cpuinfo 2>/dev/null | grep -owE 'f16c|avx2|fma|bmi2' | wc -l)
if [ "$(uname -m)" = x86_64 ] && [ "$features" = 4 ]; then
    flags="$flags -march=x86-64-v3"
fi
flags="$flags $*"

# One build at a time in a folder.
if command -v flock >/dev/null; then
    exec 9>"$objects_folder/lock"
    flock 9
fi

common=$(cat ./*.cuh host/*.h | sha256sum)
version=$("$compiler" --version | head -n 1)
objects=""
stale=""
for source in host/cuda_host.cpp host/libcuda.cpp ./*.cu ${CUDA_STANDIN_SOURCES-}; do
    [ -e "$source" ] || continue
    beside=""
    case $source in
        host/*) ;;
        ./*)
            case " ${CUDA_STANDIN_SOURCES-} " in *"/${source#./} "*) continue ;; esac
            ;;
        *) beside=$(cat "$(dirname "$source")"/*.cuh 2>/dev/null | sha256sum) ;;
    esac
    key=$(printf '%s\n' "$version" "$flags" "$common" "$(sha256sum <"$source")" $beside | sha256sum | cut -c 1-16)
    object="$objects_folder/$(basename "$source").$key.o"
    objects="$objects $object"
    [ -e "$object" ] || stale="$stale $source $object"
done

compile='"$0" $1 -I. -Ihost -include host/cuda_host.h -x c++ -c "$2" -o "$3.$$" && mv "$3.$$" "$3"'
# The words of $stale are pairs of a source and its object.
# shellcheck disable=SC2086
[ -z "$stale" ] || printf '%s %s\n' $stale |
    xargs -P "${CUDA_STANDIN_JOBS:-2}" -n 2 sh -c "$compile" "$compiler" "$flags" ||
    fail "the compiler failed (its messages stand above)"

# The name that cudarc and others look for first; with it a library that is loaded already is found again.
library="$out/libcuda.so.1"
key=$(printf '%s\n' "$flags" "$objects" | sha256sum)
if [ ! -e "$library" ] || [ "$(cat "$out/libcuda.key" 2>/dev/null)" != "$key" ]; then
    # shellcheck disable=SC2086
    "$compiler" $flags -shared -Wl,-soname,libcuda.so -o "$library.$$" $objects || fail "linking failed"
    mv "$library.$$" "$library"
    ln -sf libcuda.so.1 "$out/libcuda.so"
    printf '%s\n' "$key" >"$out/libcuda.key"
fi
printf '%s\n' "$library"
