#!/bin/sh
# Makes .tools/arm64: GStreamer's development files and the C library for 64-bit ARM, unpacked from Debian's packages
# without touching what is installed (the two architectures' development packages exclude each other).
set -eu
cd "$(dirname "$0")/.."
root=$PWD/.tools/arm64
packages="libgstreamer-plugins-base1.0-dev libc6-dev"

command -v apt-get >/dev/null && command -v dpkg >/dev/null || {
    echo "cross-sysroot: this needs apt-get and dpkg; elsewhere copy the board's /usr and /lib to $root" >&2
    exit 1
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/archives/partial" "$root"
: >"$work/status"
apt() {
    apt-get -qq -oAPT::Architecture=arm64 -oAPT::Architectures=arm64 -oDir::State::Lists="$work/lists" \
        -oDir::State::status="$work/status" -oDir::Cache::archives="$work/archives" -oDir::Cache::pkgcache= \
        -oDir::Cache::srcpkgcache= -oDebug::NoLocking=1 -oAPT::Sandbox::User=root "$@"
}
apt update
# The words of $packages are package names.
# shellcheck disable=SC2086
apt -y --no-install-recommends --download-only install $packages
for package in "$work"/archives/*.deb; do
    case $(basename "$package") in
    # Programs and their data: nothing that is linked.
    python* | perl* | libperl* | libpython* | gir1.2* | mime* | coreutils* | dpkg* | tar* | debconf* | bash* | libllvm* | \
        mesa* | libglib2.0-dev-bin*) ;;
    *) dpkg -x "$package" "$root" ;;
    esac
done
# Links to absolute paths must stay inside.
find "$root" -type l | while read -r link; do
    target=$(readlink "$link")
    case $target in
    /*) ln -sfn "$(realpath -m --relative-to="$(dirname "$link")" "$root$target")" "$link" ;;
    esac
done
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
