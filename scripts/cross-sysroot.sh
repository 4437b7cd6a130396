#!/bin/sh
# Makes .tools/arm64: GStreamer's development files and the C library for 64-bit ARM, unpacked from Debian's packages
# without touching what is installed (the two architectures' development packages exclude each other).
set -eu
cd "$(dirname "$0")/.."
root=$PWD/.tools/arm64
scripts/cross-packages.sh "$root" libgstreamer-plugins-base1.0-dev libc6-dev
# Only read for the target: build scripts for the PC itself keep the PC's own libraries.
cat >"$root.toml" <<END
[target.aarch64-unknown-linux-gnu]
rustflags = [
    "-Clink-arg=--sysroot=$root",
    "-Clink-arg=-Wl,-rpath-link,$root/usr/lib/aarch64-linux-gnu",
    "-Clink-arg=-Wl,-rpath-link,$root/lib/aarch64-linux-gnu",
]
runner = ["timeout", "600", "qemu-aarch64-static", "-L", "$root"]

[env]
PKG_CONFIG_ALLOW_CROSS = "1"
PKG_CONFIG_SYSROOT_DIR_aarch64_unknown_linux_gnu = "$root"
PKG_CONFIG_LIBDIR_aarch64_unknown_linux_gnu = "$root/usr/lib/aarch64-linux-gnu/pkgconfig"
END
du -sh "$root"
