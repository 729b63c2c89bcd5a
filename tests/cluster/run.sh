#!/bin/bash
# The acceptance suite: installs Egret in a cluster by the manifests alone, runs common workloads, disturbs them, uninstalls
# Egret, and asserts which addresses a server outside saw. README.md has the variables.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
: "${KUBECONFIG:?the cluster}" "${SERVER:?HOST:PORT of a server outside that answers with the address it saw}"
: "${ADDRESSES:?free addresses in the network of the nodes, 192.0.2.50-192.0.2.59}"
export KUBECONFIG
IMAGE=${IMAGE:-egret.invalid/egret:v$(sed -n 's/^version = "\(.*\)"$/\1/p' "$root/Cargo.toml" | head -1)}
SERVER_PATH=${SERVER_PATH:-/}
CLIENT_IMAGE=${CLIENT_IMAGE:-docker.io/library/busybox:1.37}
CNI_CONF_DIR=${CNI_CONF_DIR:-/etc/cni/net.d}
PODS=${PODS:-30}
READY_WITHIN=${READY_WITHIN:-10}
RESTART_KUBELET=${RESTART_KUBELET-systemctl restart kubelet}
RESTART_RUNTIME=${RESTART_RUNTIME-systemctl restart containerd}
# The newest one that was built here.
newest() { ls -t "$root"/target/*/release/kubectl-egret "$root"/target/*/debug/kubectl-egret 2>/dev/null | head -1; }
KUBECTL_EGRET=${KUBECTL_EGRET:-$(newest || true)}
[ -n "$KUBECTL_EGRET" ] || { (cd "$root" && "${CARGO:-cargo}" build --locked --bin kubectl-egret); KUBECTL_EGRET=$(newest || true); }
NAMESPACE=egret-cluster-test
EGRET=egret-system
address=${ADDRESSES%%[-,/]*}
figures=()
installed= mine= drained= unplugged= node_watch= keeps_connections=
for part in lib clients nodes steps; do . "$here/$part.sh"; done
work=$(mktemp -d)

# Prints what a failure left, before it is removed.
show() {
  k get nodes -o wide
  ke get pods -o wide
  ke logs -l app.kubernetes.io/name=egret --all-containers --tail=20 --prefix
  kn get pods -o wide
  k get egressgateways -o yaml
  kn get egresspolicies -o yaml
  kn get events --sort-by=.lastTimestamp | tail -20
}

# Removes everything of the suite's from the cluster, whatever happened.
take_away() {
  local code=0
  [ -z "$unplugged" ] || NODE=$unplugged bash -c "$LINK_UP" || code=1
  [ -z "$drained" ] || k uncordon "$drained" || code=1
  k delete namespace "$NAMESPACE" --ignore-not-found --timeout=120s || code=1
  if [ -n "$installed" ]; then
    ke delete daemonset/egret-node deployment/egret-controller --ignore-not-found --timeout=60s || code=1
    k apply -f "$work/uninstall.yaml" && ke rollout status daemonset/egret-uninstall --timeout=120s || code=1
    k delete -f "$work/uninstall.yaml" -f "$work/egret.yaml" --ignore-not-found --timeout=120s || code=1
  fi
  k label node "${gateways[@]}" egret.dev/gateway- || code=1
  return $code
}

end() {
  local code=$?
  trap - EXIT INT TERM
  set +e
  [ -z "$node_watch" ] || kill "$node_watch" 2>/dev/null
  if [ -n "$mine" ]; then
    [ $code = 0 ] || show 2>&1
    if [ $code != 0 ] && [ -n "${KEEP:-}" ]; then
      say 'everything stays as it is (KEEP)'
    else
      take_away >"$work/take-away" 2>&1 || { cat "$work/take-away"; say 'the clean-up failed: see above'; code=1; }
    fi
  fi
  rm -rf "$work"
  [ $code != 0 ] || { say 'passed'; printf '%s\n' '' "${figures[@]}"; }
  exit $code
}
trap end EXIT
trap 'exit 130' INT TERM

# The nodes on which the suite's pods run, and all of them.
k get nodes >/dev/null || fail "the cluster of $KUBECONFIG does not answer"
mapfile -t nodes < <(k get nodes -l kubernetes.io/os=linux -o jsonpath='{range .items[*]}{.metadata.name}{"\n"}{end}')
mapfile -t workers < <(k get nodes -l kubernetes.io/os=linux -o jsonpath='{range .items[*]}{.metadata.name} {.spec.unschedulable}{range .spec.taints[*]}{.effect}{end}{"\n"}{end}' |
  awk '$2 !~ /true|NoSchedule|NoExecute/ { print $1 }')
[ ${#workers[@]} -ge 2 ] || fail "two schedulable nodes are needed, not ${#workers[@]}"
gateways=("${workers[@]:0:2}")
for there in namespace/$EGRET namespace/$NAMESPACE crd/egressgateways.egret.dev; do
  [ -z "$(k get "$there" --ignore-not-found -o name)" ] || fail "$there exists: this cluster is in use, or an earlier run was killed"
done
for file in egret uninstall; do sed "s|egret.invalid/egret:[^ ]*|$IMAGE|" "$root/install/$file.yaml" >"$work/$file.yaml"; done

say "Kubernetes $(k version -o yaml 2>/dev/null | awk '/^serverVersion/ { server = 1 } server && /gitVersion/ { print $2 }'), ${#nodes[@]} nodes, gateways ${gateways[*]}"
assert_nodes_are_ready
mine=1
k create namespace "$NAMESPACE" >/dev/null
# For the pods that examine nodes.
k label namespace "$NAMESPACE" pod-security.kubernetes.io/enforce=privileged pod-security.kubernetes.io/warn=privileged >/dev/null
account_is_there() { kn get serviceaccount default; }
wait_for 30 'the namespace has its service account' account_is_there
watch_nodes
step_install
step_policy
step_at_once
step_workloads
step_users_test
under_traffic 'rollout of the DaemonSet' rollout
under_traffic "death of the owner's daemon" daemons_death
[ ${#workers[@]} -lt 3 ] || under_traffic 'drain of the owner' drain
step_no_gateway
assert_nodes_were_ready
assert_no_restarts
[ -z "${LINK_DOWN:-}" ] || under_traffic 'death of the owner' gateways_death
[ -z "$RESTART_KUBELET" ] || under_traffic 'restart of each kubelet' restart kubelet "$RESTART_KUBELET"
[ -z "$RESTART_RUNTIME" ] || under_traffic 'restart of each container runtime' restart runtime "$RESTART_RUNTIME"
step_uninstall
assert_nodes_are_ready
