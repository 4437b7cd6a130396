#!/bin/sh
# The tests of the kernels on 64-bit ARM: built here, run under qemu as processors without and with byte products.
# What it needs, `make test-arm64` installs (scripts/setup-arm64.sh).
set -eu
cd "$(dirname "$0")/.."
target=aarch64-unknown-linux-gnu

fail() {
    printf 'test-arm64: %s\n' "$*" >&2
    exit 1
}

qemu=$(command -v qemu-aarch64-static || command -v qemu-aarch64) ||
    fail "qemu was not found; scripts/setup-arm64.sh installs it, or says what to install"
command -v aarch64-linux-gnu-gcc >/dev/null ||
    fail "aarch64-linux-gnu-gcc was not found; scripts/setup-arm64.sh installs it, or says what to install"
sysroot=$(rustc --print sysroot)
if ! [ -d "$(rustc --print target-libdir --target $target)" ]; then
    sysroot=$PWD/.tools/arm64-rust/usr
    [ -d "$sysroot/lib/rustlib/$target" ] ||
        fail "Rust's standard library for $target was not found; run scripts/setup-arm64.sh, or: rustup target add $target"
    # The compiler that belongs to it.
    export RUSTC=/usr/bin/rustc
fi

# No GPU is simulated.
export CANDOR_CUDA=none
# A folder of its own, as the compiler may be another one.
export CARGO_TARGET_DIR=target/arm64
# Linked as a whole, so that qemu needs no C library of the other architecture.
flags="\"--sysroot=$sysroot\", \"-Ctarget-feature=+crt-static\", \"-Dwarnings\""
cargo --config cross.toml --config "target.$target.rustflags=[$flags]" \
    test --locked --target $target -p candor-kernels --lib --tests --no-run
programs=$(cargo --config cross.toml --config "target.$target.rustflags=[$flags]" \
    test --locked --target $target -p candor-kernels --lib --tests --no-run --quiet --message-format=json |
    sed -n 's/.*"executable":"\([^"]*\)".*/\1/p')
[ -n "$programs" ] || fail "the build gave no test programs"

# run PROCESSOR LEVELS: every test, as this processor, which must have just these levels.
run() {
    result=0
    echo
    echo "test-arm64: as $1, with $2"
    old_ifs=$IFS
    IFS='
'
    for program in $programs; do
        CANDOR_EXPECT_LEVELS=$2 timeout 900 "$qemu" -cpu "$1" "$program" --quiet || result=1
    done
    IFS=$old_ifs
    [ $result = 0 ] || echo "test-arm64: failed as $1"
    return $result
}
# Side by side, as one long test keeps but one core busy.
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
run cortex-a57 portable,neon >"$logs/1" 2>&1 &
first=$!
run neoverse-n1 portable,neon,dotprod >"$logs/2" 2>&1 &
second=$!
run max portable,neon,dotprod,i8mm >"$logs/3" 2>&1 &
third=$!
failed=""
for job in $first $second $third; do
    wait "$job" || failed=yes
done
cat "$logs"/*
[ -z "$failed" ] || fail "tests failed (their output stands above)"
