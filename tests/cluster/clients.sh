# Client pods: they ask the server outside which address it sees, and record the answers. Sourced by run.sh.
#
# A client writes a line for each request: the seconds since its node's boot, and the address that the server saw, or `-`
# without an answer. The path of the request names the client, for the server's own log.

# by ROLE: until the first answer, at most eight times; or for ever, a new connection each; or for ever on one connection.
readonly ASK='ask() { seen=$(wget -qO- -T 2 "http://$SERVER$SERVER_PATH?$WHO.$HOSTNAME" 2>/dev/null | tr -d "\r\n "); read -r up _ </proc/uptime; echo "$up ${seen:--}"; }'
readonly ONCE="$ASK; for n in 1 2 3 4 5 6 7 8; do ask; [ -z \"\$seen\" ] || exit 0; done; exit 1"
readonly STEADY="$ASK; trap 'exit 0' TERM; while :; do ask; sleep 0.1; done"
readonly HELD='trap "exit 0" TERM; cr=$(printf "\r")
while :; do printf "GET %s?%s.%s HTTP/1.1\r\nHost: %s\r\n\r\n" "$SERVER_PATH" "$WHO" "$HOSTNAME" "$SERVER"; sleep 0.2; done |
  nc "${SERVER%:*}" "${SERVER##*:}" |
  while read -r line; do
    case "${line%$cr}" in "" | HTTP/* | *": "*) ;; *) read -r up _ </proc/uptime; echo "$up ${line%$cr}" ;; esac
  done
echo "0 closed"
while :; do sleep 1; done'

# Text as a double-quoted string in YAML.
quoted() { printf '%s' "$1" | sed -e 's/\\/\\\\/g' -e 's/"/\\"/g' | awk '{ printf "%s%s", (NR > 1 ? "\\n" : "\""), $0 } END { print "\"" }'; }

# container NAME SCRIPT [WHO]
container() {
  printf '{name: %s, image: "%s", command: [sh, -c, %s], env: [{name: SERVER, value: "%s"}, {name: SERVER_PATH, value: "%s"}, {name: WHO, value: "%s"}]}' \
    "$1" "$CLIENT_IMAGE" "$(quoted "$2")" "$SERVER" "$SERVER_PATH" "${3:-visitor}"
}

# clients KIND NAME SCRIPT [REPLICAS [WHO]]: a Deployment or DaemonSet of pods that the policy selects.
clients() {
  local replicas=
  [ -z "${4:-}" ] || replicas="replicas: $4"
  apply <<Y
apiVersion: apps/v1
kind: $1
metadata: { name: $2 }
spec:
  $replicas
  selector: { matchLabels: { role: $2 } }
  template:
    metadata: { labels: { app: visitor, role: $2 } }
    spec:
      terminationGracePeriodSeconds: 1
      containers: [$(container main "$3" "${5:-visitor}")]
Y
  rolled_out "$1/$2" 120
}

# lines SELECTOR [CONTAINER [OPTION]]: the lines that these pods have written.
lines() {
  local pod
  kn get pods -l "$1" --field-selector=status.phase!=Pending -o name | while read -r pod; do
    kn logs "$pod" -c "${2:-main}" "${3:---tail=-1}" 2>/dev/null || true
  done
}

# assert_seen_as_egress_ip WHAT SELECTOR [CONTAINER]: at least one answer, and none with another address.
assert_seen_as_egress_ip() {
  local what=$1 seen others
  shift
  seen=$(lines "$@" | awk '$2 != "-" && $2 != "closed" { print $2 }')
  [ -n "$seen" ] || fail "$what: no pod ($*) had an answer"
  others=$(grep -vxF "$address" <<<"$seen" | sort | uniq -c || true)
  [ -z "$others" ] || fail "$what: the server saw another address than $address: $others"
}

# assert_never_seen_as_egress_ip WHAT SELECTOR: answers, and none with the egress IP.
assert_never_seen_as_egress_ip() {
  local seen
  seen=$(lines "$2" | awk '$2 != "-" { print $2 }')
  [ -n "$seen" ] || fail "$1: no pod had an answer"
  ! grep -qxF "$address" <<<"$seen" || fail "$1: the server saw $address"
}

# pauses SELECTOR [NODE]: the longest time between two answers of one pod, and how many requests had none; of pods on
# other nodes than NODE.
pauses() {
  local pod
  kn get pods -l "$1" --field-selector="spec.nodeName!=${2:-}" -o name | while read -r pod; do
    kn logs "$pod" --tail=-1 2>/dev/null |
      awk '$2 == "-" { lost++; next } $2 == "closed" { next }
           before && $1 - before > gap { gap = $1 - before } { before = $1; n++ } END { print gap + 0, lost + 0, n + 0 }'
  done | awk '$1 > gap { gap = $1 } { lost += $2; n += $3 } END { printf "%.2f s, %d of %d requests without an answer\n", gap, lost, n + lost }'
}

# The last answer to each of these pods is the egress IP, or the given address.
last_answers() { lines "$1" main --tail=1 | awk '{ print $2 }' | sort | uniq -c | awk '{ print $2 }'; }
all_leave_by_the_egress_ip() { [ "$(last_answers "$1")" = "$address" ]; }
all_leave_as_before() { last_answers "$1" | awk -v egress="$address" '$1 == egress || $1 == "-" { bad = 1 } END { exit bad || NR == 0 }'; }
none_has_an_answer() { [ "$(last_answers "$1")" = - ]; }

# Connections that were open before live on: none was closed, and each has had answers since.
assert_held_connections_live() {
  local before after pod
  [ -n "$keeps_connections" ] || return 0
  for pod in $(kn get pods -l role=held -o name); do
    before=$(kn logs "$pod" --tail=-1 | wc -l)
    sleep 1
    after=$(kn logs "$pod" --tail=-1)
    ! grep -q closed <<<"$after" || fail "$1: an open connection of $pod was closed"
    [ "$(wc -l <<<"$after")" -gt "$before" ] || fail "$1: an open connection of $pod gets no answers any more (docs/failover.md, Ports, says which may break)"
  done
}

# The server's own log since the policy is in force, if SERVER_LOG gives it: no selected pod was seen with another address,
# and no other pod with the egress IP.
assert_servers_own_log() {
  local wrong
  [ -n "${SERVER_LOG:-}" ] || { say 'the log of the server itself is not checked: set SERVER_LOG'; return 0; }
  bash -c "$SERVER_LOG" >"$work/server" || fail "SERVER_LOG: $SERVER_LOG"
  grep -qF "?visitor." "$work/server" || fail 'SERVER_LOG has no line of a pod of this suite'
  wrong=$(awk -v egress="$address" '
    index($2, "?visitor.") && $1 != egress || index($2, "?other.") && $1 == egress' "$work/server" | sort | uniq -c | sed -n 1,20p)
  [ -z "$wrong" ] || fail "$1: the server saw: $wrong"
  figure 'requests of theirs that the server itself wrote down, none from elsewhere' "$(grep -cF "?visitor." "$work/server")"
}
