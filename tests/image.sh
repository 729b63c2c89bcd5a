#!/bin/bash
# Builds the image by the Dockerfile, without a registry: onto a Debian made by debootstrap, with this machine's
# compiler and what it has compiled before. Leaves it, named IMAGE, in DIRECTORY/image.tar, as `docker save` would, and
# the paths that it has beyond Debian's in DIRECTORY/added. With the profile `release` also as an OCI archive,
# DIRECTORY/image-oci.tar, its digest in DIRECTORY/digest, and the programs that are in it in DIRECTORY/programs.
#   tests/image.sh DIRECTORY IMAGE [PROFILE]
set -eu
directory=$(realpath "$1")
image=$2
profile=${3:-dev}
cd "$(dirname "$0")/.."
# Mounts and what is stored go with this process.
[ -n "${EGRET_IMAGE_INSIDE:-}" ] || EGRET_IMAGE_INSIDE=1 exec unshare --mount "$0" "$directory" "$image" "$profile"

# A release is not made of what tests have compiled, and keeps what it has compiled itself for the next one.
compiled=$PWD/target:/src/target:O
if [ "$profile" = release ]; then
  mkdir -p "$PWD/target/image/build"
  compiled=$PWD/target/image/build:/src/target
fi

# In memory: overlays do not lie on every file system.
store=$directory/store
mkdir -p "$store"
mount -t tmpfs -o size=3g tmpfs "$store"
export TMPDIR=$store/tmp
mkdir "$TMPDIR"
buildah() { command buildah --root "$store/root" --runroot "$store/run" --storage-driver overlay "$@"; }

# The final stage stands on a Debian that nothing was added to.
suite=$(sed -n 's/^ARG BASE=.*debian:\(.*\)-slim$/\1/p' Dockerfile)
echo "image: debootstrap $suite"
debootstrap --variant=minbase "$suite" "$store/debian" >"$directory/debootstrap.log" 2>&1 ||
  { tail -20 "$directory/debootstrap.log" >&2; exit 1; }
rm -rf "$store/debian/var/cache/apt/archives" "$store/debian/var/lib/apt/lists"
base=$(buildah from scratch)
buildah add --quiet "$base" "$store/debian" / >/dev/null
buildah config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$base"
buildah commit --quiet "$base" localhost/egret-test/debian >/dev/null

# The build's stage has this machine's toolchain; what it writes there is thrown away.
cargo=${CARGO_HOME:-$HOME/.cargo}
rustup=${RUSTUP_HOME:-$HOME/.rustup}
buildah config --env "PATH=$cargo/bin:/usr/local/bin:/usr/bin:/bin" --env "CARGO_HOME=$cargo" \
  --env "RUSTUP_HOME=$rustup" --env CARGO_NET_OFFLINE=true "$base"
buildah commit --quiet "$base" localhost/egret-test/builder >/dev/null
mkdir -p target
echo "image: build"
buildah build --isolation chroot --network host --pull=never --tag "$image" \
  --build-arg BUILDER=localhost/egret-test/builder --build-arg BASE=localhost/egret-test/debian --build-arg PROFILE="$profile" \
  --volume /usr:/usr:ro --volume /etc/alternatives:/etc/alternatives:ro \
  --volume "$cargo:$cargo:O" --volume "$rustup:$rustup:O" --volume "$compiled" .

final=$(buildah from --pull=never "$image")
mounted=$(buildah mount "$final")
paths() { (cd "$1" && find . -printf '%P\n' | LC_ALL=C sort); }
LC_ALL=C comm -13 <(paths "$store/debian") <(paths "$mounted") >"$directory/added"
ls -l "$mounted/usr/local/bin"
if [ "$profile" = release ]; then
  rm -rf "$directory/programs"
  cp -r "$mounted/usr/local/bin" "$directory/programs"
fi
buildah umount "$final" >/dev/null
buildah push --quiet "$image" "docker-archive:$directory/image.tar:$image"
[ "$profile" = release ] || exit 0
buildah push --quiet --digestfile "$directory/digest" "$image" "oci-archive:$directory/image-oci.tar:$image"
# As root by sudo: what is left is the user's.
[ -z "${SUDO_UID:-}" ] || chown -R "$SUDO_UID:$SUDO_GID" "$directory" "$PWD/target/image"
