#!/bin/sh
# Installs what a build, the tests and the demo need on Debian 12, Ubuntu 22.04 or later. Does nothing where all of it
# is there already; on other systems it says what to install. `setup.sh browser` does the same for the browser that
# `make check-browser` drives, `setup.sh packages NAME...` for the packages of these names.
set -eu
cd "$(dirname "$0")/.."

packages="gcc g++ libc6-dev make pkg-config
    libgstreamer1.0-dev libgstreamer-plugins-base1.0-dev
    gstreamer1.0-plugins-base gstreamer1.0-plugins-good gstreamer1.0-plugins-bad gstreamer1.0-plugins-ugly
    gstreamer1.0-libav"

fail() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

if [ "${1-}" = browser ]; then
    # Whatever package they come from.
    for browser in chromium chromium-browser google-chrome; do
        if command -v "$browser" >/dev/null && command -v chromedriver >/dev/null; then exit 0; fi
    done
    packages="chromium chromium-driver"
elif [ "${1-}" = packages ]; then
    shift
    packages=$*
    set -- packages
fi

# The Rust toolchain is the user's own: it is checked, never installed.
needed_rust=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
command -v cargo >/dev/null || fail "cargo was not found. Install Rust $needed_rust or later with rustup and run this again."
have_rust=$(cargo --version | sed 's/^cargo \([0-9.]*\).*/\1/')
lowest=$(printf '%s\n%s\n' "$needed_rust" "$have_rust" | sort -V | head -n 1)
[ "$lowest" = "$needed_rust" ] || fail "cargo is $have_rust, but $needed_rust or later is needed. Run: rustup update stable"

if command -v apt-get >/dev/null && command -v dpkg-query >/dev/null; then
    missing=""
    for package in $packages; do
        status=$(dpkg-query -W -f '${Status}' "$package" 2>/dev/null || true)
        [ "$status" = "install ok installed" ] || missing="$missing $package"
    done
    [ -n "$missing" ] || exit 0
    as_root=""
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null || fail "as root, run: apt-get install$missing"
        as_root="sudo"
    fi
    echo "setup: installing$missing"
    $as_root apt-get update -qq || fail "apt-get update failed (its messages stand above)"
    # The words of $missing are package names from the list above.
    # shellcheck disable=SC2086
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends --no-remove $missing \
        >/dev/null ||
        fail "apt-get could not install$missing (its messages stand above)"
    exit 0
fi

[ "${1-}" != browser ] || fail "chromium and chromedriver were not found. Install them:
  Fedora         chromium chromedriver
  Arch Linux     chromium
  macOS (brew)   chromium, chromedriver"
[ "${1-}" != packages ] || fail "this needs apt-get to install: $packages"
command -v cc >/dev/null || fail "a C linker (cc) was not found: install gcc or clang"
command -v pkg-config >/dev/null || fail "pkg-config was not found: install it (pkg-config or pkgconf)"
for library in gstreamer-1.0 gstreamer-app-1.0 gstreamer-video-1.0; do
    pkg-config --atleast-version 1.14 "$library" || fail "the development files of $library (1.14 or later) were not found.
Install GStreamer with its development files and its base, good, bad, ugly and libav plugins:
  Fedora         gstreamer1-devel gstreamer1-plugins-base-devel gstreamer1-plugins-{good,bad-free,ugly} gstreamer1-plugin-libav
  Arch Linux     gstreamer gst-plugins-{base,good,bad,ugly} gst-libav
  macOS (brew)   gstreamer"
done
