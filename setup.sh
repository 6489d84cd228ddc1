#!/bin/sh
# Installs what the project needs of a Debian machine.
#
# In: nothing. Out: the packages below are installed. Holds: quick and silent when they are there; without root it says
# what to install and ends with status 1. Everything else (emulators, kernels, busybox) is fetched into the cache when it
# is needed and is never installed.
set -eu

packages="gcc libc6-dev debian-archive-keyring ca-certificates binutils gdb"

missing=
for package in $packages; do
    status=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || :)
    [ "$status" = installed ] || missing="$missing $package"
done

if ! command -v cargo >/dev/null; then
    echo "setup: there is no cargo: install Rust 1.95 or later, with rustup for example" >&2
    exit 1
fi
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ]; then
    echo "setup: packages are missing; as root: apt-get install$missing" >&2
    exit 1
fi
echo "setup: installing$missing" >&2
# shellcheck disable=SC2086 # One word each.
{
    apt-get -qq update
    DEBIAN_FRONTEND=noninteractive apt-get -qq -y install --no-install-recommends $missing
} >&2
