{{/* SPDX-License-Identifier: Apache-2.0 */}}

{{- define "latchkey.chartname" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* The beginning of all names: the release's, with the chart's if that is not in it. */}}
{{- define "latchkey.fullname" -}}
{{- $name := include "latchkey.chartname" . }}
{{- if contains $name .Release.Name }}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "latchkey.agent.name" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-agent" (include "latchkey.fullname" .) }}
{{- end }}
{{- end }}

{{- define "latchkey.server.name" -}}
{{- printf "%s-server" (.Values.fullnameOverride | trunc 40 | trimSuffix "-" | default (include "latchkey.fullname" .)) }}
{{- end }}

{{- define "latchkey.agent.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "latchkey.agent.name" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "latchkey.server.serviceAccountName" -}}
{{- if .Values.server.serviceAccount.create }}
{{- default (include "latchkey.server.name" .) .Values.server.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.server.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "latchkey.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/name: {{ include "latchkey.chartname" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{/* Selectors, which may never change: a dict of root, component and, for an agent, kind. */}}
{{- define "latchkey.selector" -}}
app.kubernetes.io/name: {{ include "latchkey.chartname" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- with .kind }}
latchkey.dev/nodes: {{ . }}
{{- end }}
{{- end }}

{{/* An image's reference: a dict of root, image, and key for the message. */}}
{{- define "latchkey.image" -}}
{{- $i := .image }}
{{- $ref := $i.override }}
{{- if not $ref }}
{{- $ref = printf "%s/%s" (trimSuffix "/" $i.containerRegistry) $i.repository }}
{{- if $i.digest }}
{{- $ref = printf "%s@%s" $ref $i.digest }}
{{- else }}
{{- $ref = printf "%s:%s" $ref ($i.tag | default .root.Chart.AppVersion | toString) }}
{{- end }}
{{- end }}
{{- if or (contains "eks-pod-identity-agent" $ref) (regexMatch "^602401143452\\.dkr\\.ecr\\." $ref) }}
{{- fail (printf "%s: %s is the image of the EKS Pod Identity Agent. Take containerRegistry, region, tag and override out of the values, or name Latchkey's image" .key $ref) }}
{{- end }}
{{- $ref }}
{{- end }}

{{/* Flags of a map. Numbers come as floats, which would print with an exponent. */}}
{{- define "latchkey.flags" -}}
{{- range $key, $value := . }}
{{- if kindIs "invalid" $value }}
- {{ $key | quote }}
{{- else if kindIs "slice" $value }}
{{- range $value }}
- {{ printf "%s=%s" $key (include "latchkey.scalar" .) | quote }}
{{- end }}
{{- else }}
- {{ printf "%s=%s" $key (include "latchkey.scalar" $value) | quote }}
{{- end }}
{{- end }}
{{- end }}

{{- define "latchkey.scalar" -}}
{{- if and (kindIs "float64" .) (eq . (float64 (int64 .))) }}{{ int64 . }}{{ else }}{{ . }}{{ end }}
{{- end }}

{{/* A command, which the EKS chart has as the text of a list. One that runs the
EKS agent is not meant for this image. */}}
{{- define "latchkey.command" -}}
{{- $text := . }}
{{- if kindIs "slice" . }}{{ $text = toJson . }}{{ end }}
{{- if and $text (ne $text "[]") (not (contains "eks-pod-identity-agent" $text)) }}
{{- $text }}
{{- end }}
{{- end }}

{{/* "true" if agents use the server of this release. */}}
{{- define "latchkey.ownServer" -}}
{{- if and .Values.server.enabled (not .Values.agent.endpoint) }}true{{ end }}
{{- end }}

{{- define "latchkey.nodeAuth" -}}
{{- if kindIs "bool" .Values.agent.nodeAuth.enabled }}
{{- if .Values.agent.nodeAuth.enabled }}true{{ end }}
{{- else }}
{{- include "latchkey.ownServer" . }}
{{- end }}
{{- end }}

{{- define "latchkey.endpoint" -}}
{{- if include "latchkey.ownServer" . }}
{{- printf "%s://%s.%s.svc:%d" (ternary "http" "https" .Values.server.tls.insecureHTTP) (include "latchkey.server.name" .) .Release.Namespace (int .Values.server.port) }}
{{- else }}
{{- .Values.agent.endpoint }}
{{- end }}
{{- end }}

{{- define "latchkey.server.tlsSecret" -}}
{{- if not .Values.server.tls.insecureHTTP }}
{{- if .Values.server.tls.secretName }}
{{- .Values.server.tls.secretName }}
{{- else if .Values.server.tls.certManager.enabled }}
{{- printf "%s-tls" (include "latchkey.server.name" .) }}
{{- else }}
{{- fail "server.tls: give secretName, a Secret with tls.crt, tls.key and ca.crt; or certManager.enabled with an issuerRef; or, where nobody can listen in, insecureHTTP" }}
{{- end }}
{{- end }}
{{- end }}

{{/* The volume's source of the CA that agents trust, empty if it is the image's. */}}
{{- define "latchkey.agent.ca" -}}
{{- $ca := .Values.agent.caBundle }}
{{- if $ca.configMap }}
configMap: {name: {{ $ca.configMap | quote }}, items: [{key: {{ $ca.key | quote }}, path: ca.crt}]}
{{- else if $ca.secret }}
secret: {secretName: {{ $ca.secret | quote }}, items: [{key: {{ $ca.key | quote }}, path: ca.crt}]}
{{- else if $ca.hostPath }}
hostPath: {path: {{ $ca.hostPath | quote }}, type: File}
{{- else if and (include "latchkey.ownServer" .) (not .Values.server.tls.insecureHTTP) }}
secret: {secretName: {{ include "latchkey.server.tlsSecret" . }}, items: [{key: ca.crt, path: ca.crt}]}
{{- else if contains "-iso" (.Values.env.AWS_REGION | default "" | toString) }}
hostPath: {path: /etc/pki/tls/certs/ca-bundle.crt, type: File}
{{- end }}
{{- end }}
