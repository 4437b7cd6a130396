#!/bin/sh
# Unpacks Debian's packages for 64-bit ARM into a folder, without touching what is installed:
#   cross-packages.sh FOLDER PACKAGE...          with the packages that they need
#   cross-packages.sh --only FOLDER PACKAGE...   without
set -eu
only=""
if [ "$1" = --only ]; then
    only=yes
    shift
fi
mkdir -p "$1"
folder=$(cd "$1" && pwd)
shift

command -v apt-get >/dev/null && command -v dpkg >/dev/null || {
    echo "cross-packages: this needs apt-get and dpkg; elsewhere copy the board's /usr and /lib to $folder" >&2
    exit 1
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/archives/partial"
: >"$work/status"
apt() {
    apt-get -qq -oAPT::Architecture=arm64 -oAPT::Architectures=arm64 -oDir::State::Lists="$work/lists" \
        -oDir::State::status="$work/status" -oDir::Cache::archives="$work/archives" -oDir::Cache::pkgcache= \
        -oDir::Cache::srcpkgcache= -oDebug::NoLocking=1 -oAPT::Sandbox::User=root "$@"
}
apt update
if [ -n "$only" ]; then
    (cd "$work/archives" && apt download "$@")
else
    apt -y --no-install-recommends --download-only install "$@"
fi
for package in "$work"/archives/*.deb; do
    case $(basename "$package") in
    # Programs and their data: nothing that is linked.
    python* | perl* | libperl* | libpython* | gir1.2* | mime* | coreutils* | dpkg* | tar* | debconf* | bash* | libllvm* | \
        mesa* | libglib2.0-dev-bin*) ;;
    *) dpkg -x "$package" "$folder" ;;
    esac
done
# Links to absolute paths must stay inside.
find "$folder" -type l | while read -r link; do
    target=$(readlink "$link")
    case $target in
    /*) ln -sfn "$(realpath -m --relative-to="$(dirname "$link")" "$folder$target")" "$link" ;;
    esac
done
