#!/bin/sh
# Installs what `make test-arm64` builds and runs with: a C linker for 64-bit ARM, qemu, and Rust's standard library for
# ARM. Does nothing where all of it is there already.
set -eu
cd "$(dirname "$0")/.."
target=aarch64-unknown-linux-gnu

fail() {
    printf 'setup-arm64: %s\n' "$*" >&2
    exit 1
}
have() { command -v "$1" >/dev/null; }

if ! [ -d "$(rustc --print target-libdir --target $target)" ]; then
    # Debian's second Rust compiler; the library comes without installing packages of another architecture.
    { have apt-get && scripts/setup.sh packages rustc-web; } ||
        fail "this Rust has no standard library for 64-bit ARM. Run: rustup target add $target"
    version=$(dpkg-query -W -f '${Version}' rustc-web)
    folder=.tools/arm64-rust
    if [ "$(cat $folder/version 2>/dev/null)" != "$version" ]; then
        rm -rf $folder
        scripts/cross-packages.sh --only $folder "libstd-rust-web-dev=$version"
        echo "$version" >$folder/version
    fi
fi
if have apt-get; then
    scripts/setup.sh packages gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static
elif ! { have aarch64-linux-gnu-gcc && { have qemu-aarch64 || have qemu-aarch64-static; }; }; then
    fail "a C linker for 64-bit ARM or qemu was not found. Install them:
  Fedora         gcc-aarch64-linux-gnu qemu-user
  Arch Linux     aarch64-linux-gnu-gcc aarch64-linux-gnu-glibc qemu-user"
fi
