# The steps of the suite, in their order. Sourced by run.sh.

step_install() {
  local begin took
  # Some CNIs make a device, a bridge for instance, when a node's first pod starts.
  clients DaemonSet first 'sleep 3600'
  kn delete daemonset/first --wait=true >/dev/null
  states "$work/before" "${nodes[@]}"
  installed=1
  begin=$(now)
  apply_silently "$work/egret.yaml"
  rolled_out daemonset/egret-node 120 "$EGRET"
  took=$(since "$begin")
  figure 'kubectl apply until the daemon of every node is ready' "$took s"
  awk -v took="$took" -v most="$READY_WITHIN" 'BEGIN { exit took > most }' || fail "it took longer than $READY_WITHIN s"
  rolled_out deployment/egret-controller 60 "$EGRET"
  assert_nodes_are_ready
  assert_no_restarts
}

# Without a policy, pods leave as before. With one, running pods leave from the egress IP, and so do new ones.
step_policy() {
  local begin
  clients Deployment running "$STEADY" 4 before
  clients DaemonSet early "$HELD" '' before
  sleep 2
  assert_never_seen_as_egress_ip 'without a policy' app=visitor
  keeps_connections=1
  ! lines role=early | grep -q closed || { keeps_connections=; say 'the server closes connections, so the suite cannot check whether they live on (server.py keeps them open)'; }
  k label node "${gateways[@]}" egret.dev/gateway=true --overwrite >/dev/null
  begin=$(now)
  apply <<Y
apiVersion: egret.dev/v1alpha1
kind: EgressGateway
metadata: { name: cluster-test }
spec: { nodeSelector: { matchLabels: { egret.dev/gateway: "true" } }, addresses: ["$ADDRESSES"], default: true }
---
apiVersion: egret.dev/v1alpha1
kind: EgressPolicy
metadata: { name: visitors }
spec:
  podSelector: { matchLabels: { app: visitor } }
  address: { ipv4: $address }
  egress: [{ to: [{ ipBlock: { cidr: ${SERVER%:*}/32 } }] }]
Y
  wait_for 30 'all running pods leave by the egress IP' all_leave_by_the_egress_ip role=running
  figure 'kubectl apply of gateway and policy until all running pods leave by it' "$(since "$begin") s"
  wait_for 30 'the policy is Ready' policy_is_ready
  figure 'the longest pause of these pods meanwhile' "$(pauses role=running)"
  # Connections from before stay as they were.
  [ -z "$keeps_connections" ] || ! lines role=early | grep -qE "closed|$address" || fail 'the policy changed connections that existed before'
  kn delete deployment/running daemonset/early --wait=true >/dev/null
}

step_at_once() {
  local begin
  begin=$(now)
  apply <<Y
apiVersion: batch/v1
kind: Job
metadata: { name: at-once }
spec:
  completions: $PODS
  parallelism: $PODS
  backoffLimit: 0
  template:
    metadata: { labels: { app: visitor, role: at-once } }
    spec: { restartPolicy: Never, containers: [$(container main "$ONCE")] }
---
apiVersion: batch/v1
kind: Job
metadata: { name: other }
spec:
  template:
    metadata: { labels: { app: other, role: other } }
    spec: { restartPolicy: Never, containers: [$(container main "$ONCE" other)] }
Y
  kn wait --for=condition=Complete job/at-once --timeout=180s >/dev/null || fail "$PODS pods at once: some had no answer"
  figure "$PODS pods that connect at once, until the last is done" "$(since "$begin") s"
  assert_seen_as_egress_ip "$PODS pods at once" role=at-once
  [ "$(lines role=at-once | wc -l)" = "$PODS" ] || fail "$PODS pods at once: a first connection had no answer: $(lines role=at-once | grep -c ' -$')"
  kn wait --for=condition=Complete job/other --timeout=60s >/dev/null || fail 'a pod without a policy had no answer'
  assert_never_seen_as_egress_ip 'a pod without a policy' app=other
  kn delete job at-once other --wait=true >/dev/null
}

step_workloads() {
  apply <<Y
apiVersion: batch/v1
kind: CronJob
metadata: { name: cron }
spec:
  schedule: "* * * * *"
  jobTemplate:
    spec:
      template:
        metadata: { labels: { app: visitor, role: cron } }
        spec: { restartPolicy: Never, containers: [$(container main "$ONCE")] }
---
apiVersion: apps/v1
kind: StatefulSet
metadata: { name: stateful }
spec:
  replicas: 2
  serviceName: stateful
  podManagementPolicy: Parallel
  selector: { matchLabels: { role: stateful } }
  template:
    metadata: { labels: { app: visitor, role: stateful } }
    spec: { terminationGracePeriodSeconds: 1, containers: [$(container main "$STEADY")] }
---
apiVersion: batch/v1
kind: Job
metadata: { name: init }
spec:
  backoffLimit: 0
  template:
    metadata: { labels: { app: visitor, role: init } }
    spec:
      restartPolicy: Never
      terminationGracePeriodSeconds: 1
      initContainers: [$(container first "$ONCE"), $(container sidecar "$STEADY" | sed 's/^{/{restartPolicy: Always, /')]
      containers: [$(container main "$ONCE")]
Y
  rolled_out statefulset/stateful 60
  kn wait --for=condition=Complete job/init --timeout=60s >/dev/null || fail 'a Job with an init container and a sidecar did not end'
  for container in first sidecar main; do assert_seen_as_egress_ip "container $container" role=init "$container"; done
  assert_seen_as_egress_ip StatefulSet role=stateful
  # The same name, another pod.
  kn delete pod stateful-0 --wait=true >/dev/null
  rolled_out statefulset/stateful 60
  sleep 1
  cron_has_run() { kn get jobs -o jsonpath='{range .items[?(@.status.succeeded==1)]}{.metadata.ownerReferences[0].name}{"\n"}{end}' | grep -qx cron; }
  wait_for 100 'the CronJob has run' cron_has_run
  for role in stateful cron; do assert_seen_as_egress_ip "$role" role=$role; done
  kn delete statefulset,cronjob,job --all --wait=true >/dev/null
}

# What a user runs on his own cluster says the same.
step_users_test() {
  local begin server=$SERVER
  # By a URL, it asks seldom, and new connections only.
  [ "$SERVER_PATH" = / ] || server="http://$SERVER$SERVER_PATH"
  begin=$(now)
  "$KUBECTL_EGRET" test --server "$server" --gateway cluster-test --pods "$PODS" >"$work/test" 2>&1 || { cat "$work/test"; fail 'kubectl egret test'; }
  grep -q '  ok       everything is deleted' "$work/test" || { cat "$work/test"; fail 'kubectl egret test does not say that it has deleted everything'; }
  figure 'kubectl egret test' "$(since "$begin") s, $(tail -1 "$work/test")"
}

# under_traffic WHAT COMMAND...: on every node, one pod makes new connections and one keeps a connection open. No pod is seen
# with another address, and no connection ends.
under_traffic() {
  local what=$1 cut_off=
  shift
  clients DaemonSet traffic "$STEADY"
  clients DaemonSet held "$HELD"
  clients Deployment replicas "$STEADY" 4
  sleep 1
  "$@"
  sleep 2
  for role in traffic held replicas; do
    [ $role = held ] && [ -z "$keeps_connections" ] && continue
    assert_seen_as_egress_ip "$what" role=$role
  done
  assert_held_connections_live "$what"
  wait_for 10 "$what: all have answers" all_leave_by_the_egress_ip role=traffic
  figure "$what: new connections, the longest pause" "$(pauses role=traffic "$cut_off")"
  [ -z "$keeps_connections" ] || figure "$what: connections that are held, the longest pause" "$(pauses role=held "$cut_off")"
  kn delete daemonset/traffic daemonset/held deployment/replicas --wait=true >/dev/null
}

rollout() {
  local begin
  begin=$(now)
  ke rollout restart daemonset/egret-node >/dev/null
  rolled_out daemonset/egret-node 300 "$EGRET"
  figure 'rollout of the DaemonSet' "$(since "$begin") s"
}

# The daemon of the owner is killed, as when it crashes.
daemons_death() {
  local pod
  pod=$(ke get pods -l app.kubernetes.io/component=node --field-selector "spec.nodeName=$(owner)" -o name)
  ke delete "$pod" --grace-period=0 --force >/dev/null 2>&1
  sleep 1
  rolled_out daemonset/egret-node 120 "$EGRET"
}

drain() {
  local node
  node=$(owner)
  drained=$node
  k drain "$node" --ignore-daemonsets --delete-emptydir-data --timeout=120s >"$work/drain" 2>&1 || fail "drain of $node: $(cat "$work/drain")"
  moved() { [ -n "$(owner)" ] && [ "$(owner)" != "$node" ]; }
  wait_for 30 "the egress IP leaves $node" moved
  k uncordon "$node" >/dev/null
  drained=
  rolled_out deployment/egret-controller 120 "$EGRET"
  rolled_out deployment/replicas 60
}

# $LINK_DOWN takes the owner's link down, as when its machine dies, and $LINK_UP restores it. The owner's own pods are cut
# off meanwhile, so their pauses do not count.
gateways_death() {
  local node
  node=$(owner)
  unplugged=$node cut_off=$node
  NODE=$node bash -c "$LINK_DOWN" || fail "LINK_DOWN for $node: $LINK_DOWN"
  moved() { [ -n "$(owner)" ] && [ "$(owner)" != "$node" ]; }
  wait_for 30 "the egress IP leaves $node" moved
  sleep 2
  NODE=$node bash -c "$LINK_UP" || fail "LINK_UP for $node: $LINK_UP"
  unplugged=
  wait_for 120 'all nodes are Ready again' all_nodes_are_ready
  rolled_out daemonset/egret-node 120 "$EGRET"
}

# Without a gateway, covered packets are dropped; they do not leave by another way.
step_no_gateway() {
  clients DaemonSet traffic "$STEADY"
  k label node "${gateways[@]}" egret.dev/gateway- >/dev/null
  wait_for 30 'without a gateway nobody has an answer' none_has_an_answer role=traffic
  clients Deployment late "$STEADY" 2
  sleep 4
  [ -z "$(lines role=late | grep -v ' -$')" ] || fail "without a gateway: a new pod had an answer: $(last_answers role=late)"
  k label node "${gateways[@]}" egret.dev/gateway=true >/dev/null
  for role in traffic late; do
    wait_for 30 'with a gateway again, all have answers' all_leave_by_the_egress_ip role=$role
    assert_seen_as_egress_ip 'without a gateway' role=$role
  done
  kn delete daemonset/traffic deployment/late --wait=true >/dev/null
}

step_uninstall() {
  local node what
  node=$(owner)
  assert_servers_own_log 'in all of it'
  # The comparison at the end must be able to see a difference.
  states "$work/with" "$node"
  for what in 'device egret' "$address"; do grep -q "$what" "$work/with/$node" || fail "on $node, the owner: $what is not found: $(cat "$work/with/$node")"; done
  diff -q <(grep -E '\.(conf|conflist|json) ' "$work/before/$node") <(grep -E '\.(conf|conflist|json) ' "$work/with/$node") >/dev/null && fail "on $node: no entry is found in $CNI_CONF_DIR"
  clients DaemonSet traffic "$STEADY"
  ke delete daemonset/egret-node deployment/egret-controller --wait=true >/dev/null
  apply_silently "$work/uninstall.yaml"
  rolled_out daemonset/egret-uninstall 120 "$EGRET"
  [ -z "$(k get egressnodes -o name)" ] || fail "EgressNodes are left: $(k get egressnodes -o name)"
  wait_for 30 'pods leave as they did before Egret' all_leave_as_before role=traffic
  k delete -f "$work/uninstall.yaml" -f "$work/egret.yaml" --ignore-not-found --wait=true >/dev/null
  installed=
  # New pods start without Egret.
  clients Deployment late "$STEADY" 4
  wait_for 30 'new pods leave as before Egret' all_leave_as_before role=late
  states "$work/after" "${nodes[@]}"
  for node in "${nodes[@]}"; do
    diff -u "$work/before/$node" "$work/after/$node" || fail "Egret leaves something on $node: see above"
  done
}
