{{- define "egret.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default (printf "v%s" .Chart.AppVersion) }}
{{- end }}

{{- define "egret.labels" -}}
app.kubernetes.io/name: egret
app.kubernetes.io/component: {{ . }}
{{- end }}
