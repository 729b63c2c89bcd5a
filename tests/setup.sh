#!/bin/bash
# Installs what tests, demo and measurements call, where it is missing: Debian and Ubuntu packages.
set -eu
declare -A package=(
  [nft]=nftables [ip]=iproute2 [iptables]=iptables [/usr/lib/cni/ptp]=containernetworking-plugins
  [conntrack]=conntrack [ipset]=ipset [tcpdump]=tcpdump [arping]=arping [socat]=socat [iperf3]=iperf3 [jq]=jq
  [sysctl]=procps [containerd]=containerd [strip]=binutils [buildah]=buildah [debootstrap]=debootstrap
  [/usr/share/keyrings/debian-archive-keyring.gpg]=debian-archive-keyring
  [/usr/lib/frr/bgpd]=frr [bpftool]=bpftool [ethtool]=ethtool [tc]=iproute2 [openssl]=openssl [curl]=curl
  [promtool]=prometheus
  [go]=golang-go [/usr/share/gocode/src/github.com/Masterminds/sprig]=golang-github-masterminds-sprig-dev
  [/usr/share/gocode/src/github.com/ghodss/yaml]=golang-github-ghodss-yaml-dev
)
# More of them: PROGRAM=PACKAGE.
for more in "$@"; do package[${more%%=*}]=${more#*=}; done
PATH=$PATH:/usr/sbin:/sbin
missing=()
for program in "${!package[@]}"; do
  command -v "$program" >/dev/null || [ -e "$program" ] || missing+=("${package[$program]}")
done
[ ${#missing[@]} = 0 ] && exit 0

echo "setup: installing ${missing[*]}"
if ! command -v apt-get >/dev/null; then
  echo "setup: this is no Debian or Ubuntu; install the equivalents of: ${missing[*]}" >&2
  exit 1
fi
sudo=()
[ "$(id -u)" = 0 ] || sudo=(sudo)
# Debian starts the services that it installs. Tests call this one's programs themselves.
if [[ " ${missing[*]} " == *" prometheus "* ]] && [ -d /run/systemd/system ]; then
  "${sudo[@]}" systemctl mask prometheus.service
fi
if [[ " ${missing[*]} " == *" frr "* ]] && [ -d /run/systemd/system ]; then
  "${sudo[@]}" systemctl mask frr.service
fi
"${sudo[@]}" apt-get update -q
"${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "${missing[@]}"
