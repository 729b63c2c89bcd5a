# Actions on the nodes themselves, by privileged pods: looking at what Egret leaves there, restarting kubelet and runtime.
# Sourced by run.sh.

# on_node NODE SCRIPT: runs it in a privileged pod with the node's network and processes, and prints its output. The
# node's files are at $host; `inside COMMAND...` runs the node's own programs.
on_node() {
  local name="on-$1" code=0
  apply <<Y || return 1
apiVersion: v1
kind: Pod
metadata: { name: $name, labels: { role: on-node } }
spec:
  nodeName: $1
  hostNetwork: true
  hostPID: true
  restartPolicy: Never
  terminationGracePeriodSeconds: 1
  tolerations: [{ operator: Exists }]
  containers:
    - name: main
      image: "$CLIENT_IMAGE"
      securityContext: { privileged: true }
      command: [sh, -c, $(quoted "$ON_NODE_BEFORE$2")]
Y
  local end=$((SECONDS + 120)) phase=
  until [ "$phase" = Succeeded ] || [ "$phase" = Failed ]; do
    [ $SECONDS -lt $end ] || { echo "on $1: does not end: $2" >&2; return 1; }
    sleep 0.3
    phase=$(kn get pod "$name" -o jsonpath='{.status.phase}' 2>/dev/null || true)
  done
  kn logs "$name" --tail=-1 || code=1
  [ "$phase" = Succeeded ] || code=1
  kn delete pod "$name" --wait=true >/dev/null
  return $code
}
readonly ON_NODE_BEFORE='host=/proc/1/root
for tool in md5sum ip nsenter pidof; do command -v $tool >/dev/null || eval "$tool() { busybox $tool \"\$@\"; }"; done
inside() { nsenter -t 1 -m -u -i -n -p -- "$@"; }
'

# What an uninstallation must restore: network configurations, rules, devices that are not pods', tables, files.
# The program egret-cni and /run/egret stay for pods that started with them (docs/install.md).
readonly STATE='cd "$host$CNI_CONF_DIR" && for file in *; do [ ! -f "$file" ] || { sum=$(md5sum <"$file") || exit 1; echo "$file $sum"; }; done
ip rule; ip -6 rule
for device in /sys/class/net/*; do
  [ "$(cat "$device/ifindex")" != "$(cat "$device/iflink")" ] || echo "device ${device##*/}"
done
ip addr | grep -wF "$EGRESS_IP"
for family in -4 -6; do ip $family route show table all 2>/dev/null | grep -E "egret|table 787[0-9]"; done
inside sh -c "command -v nft >/dev/null && nft list tables | grep -i egret"
for file in /var/lib/egret /run/egret/cni.sock; do [ ! -e "$host$file" ] || echo "file $file"; done
true'

# states DIRECTORY NODE...: writes the state of each node into a file.
states() {
  local node directory=$1
  shift
  mkdir -p "$directory"
  for node; do
    on_node "$node" "CNI_CONF_DIR=$CNI_CONF_DIR EGRESS_IP=$address; $STATE" >"$directory/$node" || fail "on $node: $(cat "$directory/$node")"
  done
}

# The time at which a node's kubelet was started, by its own metrics.
kubelet_began() { k get --raw "/api/v1/nodes/$1/proxy/metrics" | awk '$1 == "process_start_time_seconds" { print $2 }'; }

# Runs $command in the node's own shell, and waits until $process is another process. A pod that ends while its runtime is
# away has no exit code, so this one stays for some seconds.
readonly RESTART='before=$(pidof "$process"); inside sh -c "$command" || exit 1
sleep 5
for n in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
  after=$(pidof "$process"); [ -z "$before" ] || [ -z "$after" ] || [ "$after" = "$before" ] || exit 0
  [ -n "$before" ] || exit 0
  sleep 1
done
echo "$process is the same process as before: $before"; exit 1'

# restart WHAT COMMAND: kubelet or runtime, on each node in turn.
restart() {
  local node before process=kubelet
  for node in "${workers[@]}"; do
    [ "$1" = kubelet ] || process=$(k get node "$node" -o jsonpath='{.status.nodeInfo.containerRuntimeVersion}' | sed 's/:.*//; s/^cri-o$/crio/')
    before=$(kubelet_began "$node")
    on_node "$node" "process=$process command=$(printf '%q' "$2"); $RESTART" >"$work/restart" 2>&1 ||
      fail "restart of $1 on $node by '$2': $(cat "$work/restart"); RESTART_${1^^} names another command, or nothing"
    kubelet_is_new() { [ "$(kubelet_began "$node")" != "$before" ]; }
    [ "$1" != kubelet ] || wait_for 60 "kubelet of $node is a new one" kubelet_is_new
  done
  wait_for 120 'all nodes are Ready again' all_nodes_are_ready
  rolled_out daemonset/egret-node 120 "$EGRET"
}
