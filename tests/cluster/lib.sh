# Helpers of the steps: output, waiting, kubectl. Sourced by run.sh.

say() { printf '%s  %s\n' "$(date +%T)" "$*"; }
fail() { say "FAILED: $*"; exit 1; }
now() { date +%s.%N; }
since() { awk -v from="$1" -v to="$(now)" 'BEGIN { printf "%.1f", to - from }'; }
figure() { figures+=("$(printf '%-66s %s' "$1" "$2")"); say "$1: $2"; }
k() { kubectl "$@"; }
kn() { kubectl --namespace "$NAMESPACE" "$@"; }
ke() { kubectl --namespace "$EGRET" "$@"; }

# wait_for SECONDS WHAT COMMAND...
wait_for() {
  local end=$((SECONDS + $1)) what=$2
  shift 2
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt $end ] || fail "$what: not within the time allowed"
    sleep 0.2
  done
}

# apply: a manifest from standard input, in the suite's namespace.
apply() { kn apply -f - >/dev/null; }

# apply_silently FILE: kubectl must neither fail nor warn.
apply_silently() {
  k apply -f "$1" >"$work/applied" 2>&1 || { cat "$work/applied"; fail "kubectl apply of ${1##*/}"; }
  if grep -iE 'warning|error|deprecated' "$work/applied"; then fail "kubectl apply of ${1##*/} warns: see above"; fi
}

# rolled_out KIND/NAME SECONDS [NAMESPACE]
rolled_out() {
  kubectl --namespace "${3:-$NAMESPACE}" rollout status "$1" --timeout="$2s" >/dev/null || fail "$1 is not ready within $2 s"
}

nodes_not_ready() {
  k get nodes -o jsonpath='{range .items[*]}{.metadata.name}={.status.conditions[?(@.type=="Ready")].status}{"\n"}{end}' |
    grep -v '=True$' || true
}
all_nodes_are_ready() { [ -z "$(nodes_not_ready)" ]; }
assert_nodes_are_ready() { all_nodes_are_ready || fail "nodes are not Ready: $(nodes_not_ready)"; }

# From here on, every node that is not Ready at any time is recorded.
watch_nodes() {
  kubectl get nodes --watch -o 'jsonpath={.metadata.name}={.status.conditions[?(@.type=="Ready")].status}{"\n"}' >"$work/nodes" 2>/dev/null &
  node_watch=$!
}
assert_nodes_were_ready() {
  local not
  kill -0 "$node_watch" 2>/dev/null || fail 'the watch of the nodes ended'
  [ -s "$work/nodes" ] || fail 'the watch of the nodes reported nothing'
  not=$(grep -v '=True$' "$work/nodes" | sort | uniq -c || true)
  [ -z "$not" ] || fail "nodes were not Ready at some time: $not"
}

# No container of Egret's was restarted by its kubelet.
assert_no_restarts() {
  local restarted
  restarted=$(ke get pods -l app.kubernetes.io/name=egret -o jsonpath='{range .items[*]}{.metadata.name}{range .status.containerStatuses[*]} {.restartCount}{end}{range .status.initContainerStatuses[*]} {.restartCount}{end}{"\n"}{end}' |
    grep -v '^[^ ]*\( 0\)*$' || true)
  [ -z "$restarted" ] || fail "containers were restarted (pod, counts): $restarted"
}

# Which node holds the visitors' egress IP.
owner() { kn get egresspolicy visitors -o jsonpath='{.status.node}'; }
policy_is_ready() {
  [ "$(kn get egresspolicy visitors -o jsonpath='{.status.conditions[?(@.type=="Ready")].status}')" = True ]
}
