{{- define "vcnode.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 52 | trimSuffix "-" }}{{ else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 52 | trimSuffix "-" }}{{ end -}}
{{- end }}

{{- define "vcnode.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "vcnode.labels" -}}
{{ include "vcnode.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "vcnode.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "vcnode.serviceAccount" -}}
{{ .Values.serviceAccount.name | default (include "vcnode.name" .) }}
{{- end }}

{{/* The settings file. What the chart decides goes over what the user gave. */}}
{{- define "vcnode.settings" -}}
{{- $nats := dict "url" .Values.nats.url "prefix" .Values.nats.prefix }}
{{- if .Values.nats.credentials.secretName }}
{{- $_ := set $nats "creds_file" (printf "/etc/vcnode/credentials/%s" .Values.nats.credentials.key) }}
{{- end }}
{{- with .Values.nats.tls }}
{{- if .secretName }}
{{- if .caKey }}{{ $_ := set $nats "tls_ca_file" (printf "/etc/vcnode/tls/%s" .caKey) }}{{ end }}
{{- if .certKey }}{{ $_ := set $nats "tls_cert_file" (printf "/etc/vcnode/tls/%s" .certKey) }}{{ end }}
{{- if .keyKey }}{{ $_ := set $nats "tls_key_file" (printf "/etc/vcnode/tls/%s" .keyKey) }}{{ end }}
{{- end }}
{{- end }}
{{- $own := dict "guest_dir" "/usr/share/vcnode/guest" "state_dir" .Values.host.stateDir "run_dir" .Values.host.runDir "metrics_address" (printf "0.0.0.0:%v" .Values.metrics.port) "log_format" "json" "nats" $nats }}
{{- mergeOverwrite (deepCopy .Values.config) $own | toToml }}
{{- end }}
