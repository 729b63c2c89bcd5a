#!/bin/bash
# An assign hook for AWS EC2 (docs/clouds.md): makes an egress IP a secondary address of the node's network interface.
#
#   socat UNIX-LISTEN:/run/egret/hook.sock,fork,mode=600 EXEC:/opt/aws.sh
#   egretd node --assign-hook unix:/run/egret/hook.sock …
#
# It reads one HTTP request from standard input and writes one answer. It needs curl, jq and the AWS CLI, runs on the node,
# and the node's role needs ec2:AssignPrivateIpAddresses, UnassignPrivateIpAddresses, AssignIpv6Addresses,
# UnassignIpv6Addresses and DescribeNetworkInterfaces.
set -eu
export LC_ALL=C
metadata=${AWS_METADATA:-http://169.254.169.254}

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
mac=$(jq -r '.mac // ""' <<<"$request")

# The interface that the node puts the address on, by its MAC address.
token=$(curl -sS --fail --max-time 3 -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' "$metadata/latest/api/token" 2>&1) ||
  answer '502 Bad Gateway' "metadata: $token"
interface=$(curl -sS --fail --max-time 3 -H "X-aws-ec2-metadata-token: $token" \
  "$metadata/latest/meta-data/network/interfaces/macs/$mac/interface-id" 2>&1) ||
  answer '502 Bad Gateway' "no network interface of this instance has the MAC address $mac: $interface"

ec2() { aws ec2 "$@" --cli-connect-timeout 3 --cli-read-timeout 8 2>&1; }

case $action:$address in
  assign:*:*)
    # An IPv6 address cannot be reassigned in one step.
    now=$(ec2 describe-network-interfaces --filters "Name=ipv6-addresses.ipv6-address,Values=$address" \
      --query 'NetworkInterfaces[0].NetworkInterfaceId' --output text) || answer '502 Bad Gateway' "$now"
    [ "$now" != "$interface" ] || answer '200 OK' ''
    if [ "$now" != None ]; then
      said=$(ec2 unassign-ipv6-addresses --network-interface-id "$now" --ipv6-addresses "$address") ||
        answer '502 Bad Gateway' "$said"
    fi
    said=$(ec2 assign-ipv6-addresses --network-interface-id "$interface" --ipv6-addresses "$address") ||
      answer '502 Bad Gateway' "$said" ;;
  assign:*)
    said=$(ec2 assign-private-ip-addresses --allow-reassignment --network-interface-id "$interface" \
      --private-ip-addresses "$address") || answer '502 Bad Gateway' "$said" ;;
  # Another node may have the address by now, and then these fail.
  release:*:*) ec2 unassign-ipv6-addresses --network-interface-id "$interface" --ipv6-addresses "$address" >/dev/null || true ;;
  release:*) ec2 unassign-private-ip-addresses --network-interface-id "$interface" --private-ip-addresses "$address" >/dev/null || true ;;
esac
answer '200 OK' ''
