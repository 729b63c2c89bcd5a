#!/bin/bash
# Prints a directory that holds kube-apiserver and etcd, and gets them first if they are not there:
# 1. KUBEBUILDER_ASSETS, as controller-runtime's envtest has it;
# 2. the envtest binaries, downloaded, the version and the checksum pinned here;
# 3. where GitHub is out of reach: Debian's own source package, built once (3.5 minutes on two cores).
# With --cached nothing is downloaded or built: it fails if they are not there yet.
set -eu

envtest=1.30.0
# https://github.com/kubernetes-sigs/controller-tools/blob/main/envtest-releases.yaml, sha512.
declare -A sha512=(
  [x86_64]=d53870e1a6c9b3b50366489a9387f4e254c664955e932e3e25e2088bb437b270bfab75d241b50849233f9a34bb1f08b41567ebb81ea29352104ae0f5b1cb9e88
  [aarch64]=140748efaa394598f50175e809cd53896881ed046d93ebdfbd5442100f68b3d8d51fd22f8cf1ae06a6e43473897b789df0db6e0ae6c45c8320b000d5ee900005
)
declare -A go=([x86_64]=amd64 [aarch64]=arm64)
machine=$(uname -m)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/egret/kubernetes
downloaded=$cache/envtest-$envtest
built=$cache/debian

complete() { [ -x "$1/kube-apiserver" ] && [ -x "$1/etcd" ]; }
say() { echo "apiserver: $*" >&2; }
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

if [ -n "${KUBEBUILDER_ASSETS:-}" ]; then
  complete "$KUBEBUILDER_ASSETS" || { say "KUBEBUILDER_ASSETS is $KUBEBUILDER_ASSETS, which lacks kube-apiserver or etcd"; exit 1; }
  echo "$KUBEBUILDER_ASSETS"
  exit
fi
for directory in "$downloaded" "$built"; do
  if complete "$directory"; then echo "$directory"; exit; fi
done
[ "${1:-}" != --cached ] || { say "no kube-apiserver here yet; run tests/setup.sh"; exit 1; }

mkdir -p "$cache"
# Several may come at once; the first one works, the others find it done.
exec 9>"$cache/lock"
flock 9
for directory in "$downloaded" "$built"; do
  if complete "$directory"; then echo "$directory"; exit; fi
done
work=$(mktemp -d "$cache/work.XXXXXX")
trap 'chmod -R u+w "$work"; rm -rf "$work"' EXIT

download() {
  [ -n "${sha512[$machine]:-}" ] || return 1
  local name=envtest-v$envtest-linux-${go[$machine]}.tar.gz
  curl -fsSL --connect-timeout 10 --max-time 600 -o "$work/$name" \
    "https://github.com/kubernetes-sigs/controller-tools/releases/download/envtest-v$envtest/$name" || return 1
  echo "${sha512[$machine]}  $work/$name" | sha512sum --check --quiet >&2 || { say "$name has another checksum than it should"; return 1; }
  mkdir "$work/envtest"
  tar -xzf "$work/$name" -C "$work/envtest" --strip-components=2
  complete "$work/envtest" && mv "$work/envtest" "$downloaded"
}

build() {
  command -v apt-get >/dev/null || { say "this is no Debian; set KUBEBUILDER_ASSETS"; return 1; }
  local tools=(golang-go rsync make dpkg-dev etcd-server) missing=()
  for package in "${tools[@]}"; do
    dpkg-query -Wf '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
  done
  if [ ${#missing[@]} != 0 ]; then
    say "installing ${missing[*]}"
    as_root apt-get update -q >&2
    # Debian's etcd starts a service, which the tests do not want.
    as_root env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -qy --no-install-recommends "${missing[@]}" >&2
  fi
  # A source list of its own: the machine's has no deb-src, and stays as it is.
  . /etc/os-release
  local apt=$work/apt
  mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial"
  for type in deb deb-src; do
    echo "$type [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian $VERSION_CODENAME main"
  done >"$apt/sources.list"
  local options=(-o Dir::Etc::sourcelist="$apt/sources.list" -o Dir::Etc::sourceparts=- -o Dir::State::lists="$apt/lists" -o Dir::Cache="$apt/cache" -o APT::Sandbox::User=)
  apt-get "${options[@]}" -q update >&2
  (cd "$work" && apt-get "${options[@]}" -q source kubernetes) >&2
  local source
  source=$(find "$work" -mindepth 1 -maxdepth 1 -type d -name 'kubernetes-*' -print -quit)
  # Its makefile wants to lie in a GOPATH, and its packages have no modules.
  mkdir -p "$work/go/src/k8s.io"
  mv "$source" "$work/go/src/k8s.io/kubernetes"
  # The vendored reflect2 is older than Go 1.18 and reads maps as they were before: the server would crash with the first
  # custom resource. Debian has a newer one.
  local vendored=$work/go/src/k8s.io/kubernetes/vendor/github.com/modern-go/reflect2
  (cd "$work" && apt-get "${options[@]}" -q download golang-github-modern-go-reflect2-dev) >&2
  dpkg-deb -x "$work"/golang-github-modern-go-reflect2-dev_*.deb "$work/reflect2"
  rm -r "$vendored"
  cp -r "$work/reflect2/usr/share/gocode/src/github.com/modern-go/reflect2" "$vendored"
  say "building kube-apiserver; it is kept in $built"
  # Without a version the server says 0.0.0, by which clients judge what it can do.
  local version=${source##*/kubernetes-}
  (
    cd "$work/go/src/k8s.io/kubernetes"
    printf "KUBE_GIT_COMMIT=debian\nKUBE_GIT_TREE_STATE=archive\nKUBE_GIT_VERSION=v%s\nKUBE_GIT_MAJOR=%s\nKUBE_GIT_MINOR=%s\n" \
      "$version" "$(cut -d. -f1 <<<"$version")" "$(cut -d. -f2 <<<"$version")" >version.sh
    GOPATH=$work/go GOCACHE=$work/gocache GO111MODULE=off GOFLAGS= KUBE_GIT_VERSION_FILE=$PWD/version.sh make WHAT=cmd/kube-apiserver
  ) >&2
  mkdir "$work/built"
  cp "$work/go/src/k8s.io/kubernetes/_output/bin/kube-apiserver" "$work/built/"
  cp "$(PATH=$PATH:/usr/sbin command -v etcd)" "$work/built/"
  complete "$work/built" && mv "$work/built" "$built"
}

say "getting kube-apiserver and etcd; once"
if download; then echo "$downloaded"; elif build; then echo "$built"; else exit 1; fi
