#!/bin/bash
# Fetches a Debian kernel, once, and prints the directory with its /boot and /lib/modules. `kernel.sh 5.10`.
# Only names of suites and packages are asked for; apt verifies them by Debian's key.
set -eu
kernel=$1
case $kernel in
  5.10) suites="bullseye bullseye-security" ;;
  6.1) suites="bookworm bookworm-security" ;;
  6.12) suites="trixie trixie-security" ;;
  newest) suites="sid" ;;
  *)
    echo "vm-test: KERNEL=$kernel is none of 5.10, 6.1, 6.12, newest" >&2
    exit 1
    ;;
esac
cache=${XDG_CACHE_HOME:-$HOME/.cache}/egret/vm/$kernel
if [ -e "$cache/done" ]; then
  echo "$cache/root"
  exit 0
fi
rm -rf "$cache"
mkdir -p "$cache"/{lists/partial,archives/partial,debs,root}
for suite in $suites; do
  mirror=http://deb.debian.org/debian
  case $suite in *-security) mirror=http://deb.debian.org/debian-security ;; esac
  echo "deb [arch=amd64 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main"
done >"$cache/sources.list"
: >"$cache/status"
# An apt of its own: nothing of the machine's lists or packages changes.
apt=(-q -o "Dir::Etc::sourcelist=$cache/sources.list" -o Dir::Etc::sourceparts=/dev/null -o Dir::Etc::preferencesparts=/dev/null
  -o "Dir::State::lists=$cache/lists" -o "Dir::State::status=$cache/status" -o "Dir::Cache=$cache/archives"
  -o APT::Architecture=amd64 -o APT::Architectures=amd64 -o APT::Sandbox::User=root -o Acquire::Languages=none
  # A suite that is archived is not signed any more.
  -o Acquire::Check-Valid-Until=false)
apt-get "${apt[@]}" update >&2
depends() { apt-cache "${apt[@]}" depends --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces "$1"; }
image=$(depends linux-image-amd64 | sed -n 's/.*Depends: \(linux-image-[0-9].*\)/\1/p' | head -1)
# Newer packages have their modules beside them.
modules=$(depends "$image" | sed -n 's/.*Depends: \(linux-\(modules\|binary\)-[0-9].*\)/\1/p')
# shellcheck disable=SC2086
(cd "$cache/debs" && apt-get "${apt[@]}" download $image $modules) >&2
for deb in "$cache"/debs/*.deb; do
  dpkg-deb -x "$deb" "$cache/root"
done
# Newer packages merge /lib into /usr/lib.
[ -d "$cache/root/lib/modules" ] || { mkdir -p "$cache/root/lib" && mv "$cache/root/usr/lib/modules" "$cache/root/lib/modules"; }
for modules in "$cache"/root/lib/modules/*; do
  PATH=$PATH:/usr/sbin:/sbin depmod -b "$cache/root" "$(basename "$modules")"
done
rm -rf "$cache"/{lists,archives,debs}
touch "$cache/done"
echo "$cache/root"
