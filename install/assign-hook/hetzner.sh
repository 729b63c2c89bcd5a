#!/bin/bash
# An assign hook for Hetzner Cloud (docs/clouds.md): moves a floating IP to the server that asks for it.
#
#   HCLOUD_TOKEN=… socat UNIX-LISTEN:/run/egret/hook.sock,fork,mode=600 EXEC:/opt/hetzner.sh
#   egretd node --assign-hook unix:/run/egret/hook.sock …
#
# It reads one HTTP request from standard input and writes one answer. It needs curl and jq, and runs on the node.
set -eu
export LC_ALL=C
api=${HCLOUD_API:-https://api.hetzner.cloud/v1}
metadata=${HCLOUD_METADATA:-http://169.254.169.254/hetzner/v1/metadata}

answer() { # status, text
  printf 'HTTP/1.1 %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s' "$1" "${#2}" "$2"
  exit 0
}

length=0
while IFS= read -r line && line=${line%$'\r'} && [ -n "$line" ]; do
  case ${line,,} in content-length:*) length=$((${line#*:})) ;; esac
done
request=$(head -c "$length")
action=$(jq -er .action <<<"$request") || answer '400 Bad Request' 'no action'
address=$(jq -er .address <<<"$request") || answer '400 Bad Request' 'no address'

# The floating IP stays where it is until another node asks for it.
[ "$action" = assign ] || answer '200 OK' ''

call() { # path, more arguments of curl
  curl -sS --fail-with-body --max-time 10 -H "Authorization: Bearer $HCLOUD_TOKEN" -H 'Content-Type: application/json' \
    "$api$1" "${@:2}" 2>&1
}

server=$(curl -sS --fail --max-time 5 "$metadata/instance-id" 2>&1) || answer '502 Bad Gateway' "metadata: $server"
# A floating IPv6 network is a /64; an egress IP is an address in it.
list=$(call '/floating_ips?per_page=50') || answer '502 Bad Gateway' "list of floating IPs: $list"
found=$(jq -r --arg a "$address" '
  def half: split("::")[0] | split(":")[0:4] | join(":");
  [.floating_ips[] | select(.ip == $a or (.type == "ipv6" and (.ip | half) == ($a | half)))][0] // empty
  | "\(.id) \(.server // 0)"' <<<"$list")
[ -n "$found" ] || answer '404 Not Found' "no floating IP of this project has $address"
read -r id now <<<"$found"
[ "$now" != "$server" ] || answer '200 OK' ''
said=$(call "/floating_ips/$id/actions/assign" -d "{\"server\": $server}") || answer '502 Bad Gateway' "assign: $said"

# The action is done when Hetzner says so.
action=$(jq -er .action.id <<<"$said") || answer '502 Bad Gateway' "assign: $said"
for _ in 1 2 3 4 5 6 7 8 9 10; do
  said=$(call "/actions/$action") || answer '502 Bad Gateway' "action: $said"
  case $(jq -r .action.status <<<"$said") in
    success) answer '200 OK' '' ;;
    error) answer '502 Bad Gateway' "$(jq -r .action.error.message <<<"$said")" ;;
  esac
  sleep 1
done
answer '504 Gateway Timeout' "action $action has not ended within 10 s"
