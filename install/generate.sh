#!/bin/bash
# Writes what is made of other files: the definitions of the objects from the types, the one file of `kubectl apply -f`
# from kustomize's base, the chart's copies. With a directory as its argument it writes them there.
set -eu
cd "$(dirname "$0")/.."
to=${1:-install}
mkdir -p "$to/chart/crds" "$to/chart/templates"

crds=$(mktemp)
trap 'rm -f "$crds"' EXIT
cargo run --locked --quiet --bin egretd -- crds >"$crds"
cp "$crds" "$to/crds.yaml"
cp "$crds" "$to/chart/crds/crds.yaml"

{
  echo '# Egret, whole: kubectl apply -f egret.yaml. Made by install/generate.sh from the files of kustomization.yaml.'
  for file in $(sed -n 's/^  - //p' install/kustomization.yaml); do
    echo '---'
    if [ "$file" = crds.yaml ]; then cat "$crds"; else cat "install/$file"; fi
  done
} >"$to/egret.yaml"

# copied FILE [VALUE]: as a template of the chart, if VALUE is so.
copied() {
  {
    echo "{{- /* Made by install/generate.sh from install/$1. */ -}}"
    [ $# = 1 ] || echo "{{- if .Values.$2 }}"
    sed 's/namespace: egret-system$/namespace: {{ .Release.Namespace }}/' "install/$1"
    [ $# = 1 ] || echo '{{- end }}'
  } >"$to/chart/templates/$1"
}
copied rbac.yaml
copied admission.yaml admissionPolicy
copied metrics-authentication.yaml metricsAuthentication
copied kube-vip-annotations.yaml kubeVipAnnotations

# The board and the alerts, as templates of the chart. Both have Prometheus' own templates in them: Helm must not read
# those. embedded NAME VALUE FILE INDENT: the head of an object from standard input, and below it the file.
embedded() {
  {
    echo "{{- /* Made by install/generate.sh from install/$3. */ -}}"
    echo "{{- if and .Values.monitoring.$2 (not .Values.uninstall) }}"
    cat
    sed -e 's/{{/{{ "{{" }}/g' -e "s/^./$4&/" "install/$3"
    echo '{{- end }}'
  } >"$to/chart/templates/$1"
}
embedded dashboard.yaml dashboard grafana/egret.json '    ' <<'EOF'
apiVersion: v1
kind: ConfigMap
metadata:
  name: egret-dashboard
  namespace: {{ .Release.Namespace }}
  labels:
    grafana_dashboard: "1"
    {{- with .Values.monitoring.labels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
data:
  egret.json: |
EOF
embedded rules.yaml rules prometheus/rules.yaml '  ' <<'EOF'
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: egret
  namespace: {{ .Release.Namespace }}
  {{- with .Values.monitoring.labels }}
  labels:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
EOF
