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
