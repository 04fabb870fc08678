{{/* What the schema cannot say, or not clearly. */}}
{{- define "warren.validate" -}}
{{- if not .Values.podPools }}
{{- fail "podPools is empty: list the prefixes that pods get their addresses from, for example --set podPools='{10.244.0.0/16,fd00:10:244::/48}'" }}
{{- end }}
{{- if not .Values.nodePools }}
{{- fail "nodePools is empty: list the prefixes that nodes have their addresses in, for example --set nodePools='{192.168.0.0/24}'" }}
{{- end }}
{{- if ne .Values.encryption.type "wireguard" }}
{{- fail (printf "encryption.type=%s: WireGuard is the only one there is; use wireguard" .Values.encryption.type) }}
{{- end }}
{{- range $part := list "relay" "ui" }}
{{- if dig $part "enabled" false $.Values.hubble }}
{{- fail (printf "hubble.%s.enabled=true: flow visibility is not part of this release; leave hubble.* at false" $part) }}
{{- end }}
{{- end }}
{{- if .Values.hubble.enabled }}
{{- fail "hubble.enabled=true: flow visibility is not part of this release; leave hubble.* at false" }}
{{- end }}
{{- end }}

{{- define "warren.labels" -}}
app.kubernetes.io/name: {{ .name }}
app.kubernetes.io/part-of: warren
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{- define "warren.selector" -}}
app.kubernetes.io/name: {{ .name }}
app.kubernetes.io/part-of: warren
{{- end }}

{{- define "warren.image" -}}
image: {{ printf "%s/%s:%s" .root.Values.image.registry .name .root.Values.image.tag | quote }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
{{- end }}

{{/* Changes when the configuration does, so that pods start again with the new one. */}}
{{- define "warren.checksum" -}}
warren.dev/config: {{ include "warren.config" . | sha256sum }}
{{- end }}

{{- define "warren.config" -}}
{{- include "warren.validate" . -}}
clusterName: {{ .Values.clusterName | quote }}
encryption: {{ .Values.encryption.enabled }}
podPools: {{ toJson .Values.podPools }}
nodePools: {{ toJson .Values.nodePools }}
serviceCidrs: {{ toJson .Values.serviceCIDRs }}
prefixSource: {{ .Values.prefixSource }}
datapath: {{ .Values.datapath }}
wireguardPort: {{ int .Values.wireguard.port }}
keydPort: {{ int .Values.keyd.port }}
apiserverPort: {{ int .Values.apiServer.port }}
preSharedKeys: {{ .Values.encryption.preSharedKeys }}
keepaliveSeconds: {{ int .Values.wireguard.persistentKeepalive }}
markMask: {{ int64 .Values.markMask }}
nodePorts: {{ toJson .Values.nodePorts }}
hostReachesPods: {{ .Values.policy.hostReachesPods }}
policyAudit: {{ .Values.policy.audit }}
podsMayAudit: {{ .Values.policy.podsMayAudit }}
{{- if .Values.policy.ignoredLabels }}
ignoredLabels: {{ toJson .Values.policy.ignoredLabels }}
{{- end }}
identitiesPerNamespace: {{ int .Values.policy.identitiesPerNamespace }}
snapshotExpirySeconds: {{ int64 .Values.keyd.snapshotExpiry }}
snapshotHardFail: {{ .Values.keyd.snapshotHardFail }}
signingKeyMaxAgeSeconds: {{ int64 .Values.keyd.signingKeyMaxAge }}
{{- end }}
