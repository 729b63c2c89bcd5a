#!/bin/bash
# Prints a directory that holds kube-apiserver and etcd (and kubectl, where it is there), and gets them first if they are
# not there:
# 1. KUBEBUILDER_ASSETS, as controller-runtime's envtest has it;
# 2. the newest that is kept in the user's cache directory, whoever put it there, by what it says of itself;
# 3. the envtest binaries, downloaded, the version and the checksum pinned here;
# 4. where GitHub is out of reach: Debian's own source package, built once (3.5 minutes on two cores).
# With --cached nothing is downloaded or built: it fails if they are not there yet. With --oldest it is Debian's, which is
# the oldest that Egret is tried with.
set -eu

envtest=1.36.2
# https://github.com/kubernetes-sigs/controller-tools/blob/main/envtest-releases.yaml, sha512.
declare -A sha512=(
  [x86_64]=ea743186c8a799f5cf8faf16969f86189d003cb7d130e0ac4b58789f1e5748dcf30ebe91c837a10d5ac415383da3e10b9e64d65785c938c23e739781cfb76f08
  [aarch64]=2d72ee985a8e262a3c57dc9f7f0fd891f6a8c7bf7ebaa2db6dc6d8eac8ae28181afe51c1f368b67756cdb40b10de9b205609e1726e5f27f7c6d824dd9c6649ac
)
declare -A go=([x86_64]=amd64 [aarch64]=arm64)
machine=$(uname -m)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/egret/kubernetes
downloaded=$cache/envtest-$envtest
built=$cache/debian
mode=${1:-}

complete() { [ -x "$1/kube-apiserver" ] && [ -x "$1/etcd" ]; }
say() { echo "apiserver: $*" >&2; }
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }
version() { "$1/kube-apiserver" --version 2>/dev/null | sed -n 's/^Kubernetes v//p'; }
use() {
  say "Kubernetes $(version "$1"), in $1"
  echo "$1"
  exit
}

newest() {
  local directory version
  for directory in "$cache"/*/; do
    directory=${directory%/}
    if complete "$directory"; then
      version=$(version "$directory")
      [ -z "$version" ] || echo "$version $directory"
    fi
  done | sort -V | tail -n 1 | cut -d ' ' -f 2-
}
use_cached() {
  local directory=$built
  [ "$mode" = --oldest ] || directory=$(newest)
  if [ -n "$directory" ] && complete "$directory"; then use "$directory"; fi
}

if [ -n "${KUBEBUILDER_ASSETS:-}" ] && [ "$mode" != --oldest ]; then
  complete "$KUBEBUILDER_ASSETS" || { say "KUBEBUILDER_ASSETS is $KUBEBUILDER_ASSETS, which lacks kube-apiserver or etcd"; exit 1; }
  use "$KUBEBUILDER_ASSETS"
fi
use_cached
[ "$mode" != --cached ] || { say "no kube-apiserver here yet; run make apiserver"; exit 1; }

mkdir -p "$cache"
# Several may come at once; the first one works, the others find it done.
exec 9>"$cache/lock"
flock 9
use_cached
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
if [ "$mode" != --oldest ] && download; then use "$downloaded"; fi
build || exit 1
use "$built"
