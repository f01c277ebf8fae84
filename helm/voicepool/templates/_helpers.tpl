{{- define "voicepool.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains "voicepool" .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-voicepool" .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "voicepool.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
app.kubernetes.io/name: voicepool
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- /* Labels that select the pods of a component. Called with (list $ "operator"). */ -}}
{{- define "voicepool.selector" -}}
app.kubernetes.io/name: voicepool
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{- define "voicepool.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{- /* A tag of digits alone comes as a number. */ -}}
{{ .repository }}:{{ if kindIs "float64" .tag }}{{ printf "%.0f" .tag }}{{ else }}{{ .tag | default $.Chart.AppVersion }}{{ end }}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* No user here: the image has one, and OpenShift gives its own. */ -}}
{{- define "voicepool.podSecurityContext" -}}
runAsNonRoot: true
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "voicepool.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{- /* Settings of a component: ours, and those of values on top; a map, since no variable may come twice. Called with (list $ours $more). */ -}}
{{- define "voicepool.env" -}}
{{- range $name, $value := mergeOverwrite (dict) (index . 0) (index . 1) }}
- name: {{ $name }}
  value: {{ $value | toString | quote }}
{{- end }}
{{- end -}}

{{- /* Where a pod of ours may run. Called with a component's values. */ -}}
{{- define "voicepool.scheduling" -}}
{{- with .nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end -}}

{{- define "voicepool.operatorRules" -}}
- apiGroups: [voicepool.dev]
  resources: [voiceagentpools]
  verbs: [get, list, watch]
- apiGroups: [voicepool.dev]
  resources: [voiceagentpools/status]
  verbs: [patch]
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create]
{{- end -}}

{{- define "voicepool.gatewayRules" -}}
- apiGroups: [voicepool.dev]
  resources: [voiceagentpools]
  verbs: [get, list, watch]
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [pods/log]
  verbs: [get]
{{- end -}}

{{- /* Secrets that are made once, at the first installation, and found again in the cluster ever after. Kept in .Values.generated, so that all
       templates of one rendering see the same. */ -}}
{{- define "voicepool.generate" -}}
{{- if not (hasKey .Values "generated") -}}
{{- $name := include "voicepool.fullname" . -}}
{{- $generated := dict "certificate" "" "apiKeys" (dict) "firstApiKey" "" -}}
{{- if not .Values.assignment.existingSecret -}}
{{- $secret := lookup "v1" "Secret" .Release.Namespace (printf "%s-assignment" $name) -}}
{{- $public := lookup "v1" "ConfigMap" .Release.Namespace (printf "%s-assignment-public" $name) -}}
{{- if and $secret $public -}}
{{- $_ := set $generated "privateKey" (index $secret.data "private.pem" | b64dec) -}}
{{- $_ := set $generated "certificate" (index $public.data "certificate.pem") -}}
{{- else -}}
{{- /* A certificate is the only way by which a chart gets at a public key. Nobody looks at its dates. */ -}}
{{- $private := genPrivateKey "ed25519" -}}
{{- $_ := set $generated "privateKey" $private -}}
{{- $_ := set $generated "certificate" (genSelfSignedCertWithKey "voicepool-gateway" nil nil 36500 $private).Cert -}}
{{- end -}}
{{- end -}}
{{- if not .Values.apiKeys.existingSecret -}}
{{- $keys := lookup "v1" "Secret" .Release.Namespace (printf "%s-api-keys" $name) -}}
{{- if $keys -}}
{{- /* As it is: keys that were added or withdrawn since stay so, and a first key that was deleted is not made again. */ -}}
{{- $_ := set $generated "apiKeys" ($keys.data | default dict) -}}
{{- with lookup "v1" "Secret" .Release.Namespace (printf "%s-first-api-key" $name) -}}
{{- $_ := set $generated "firstApiKey" (index .data "api-key") -}}
{{- end -}}
{{- else -}}
{{- $key := printf "vp_%s" (randAlphaNum 40) -}}
{{- $_ := set $generated "apiKeys" (dict "default" (printf "sha256:%s" (sha256sum $key) | b64enc)) -}}
{{- $_ := set $generated "firstApiKey" ($key | b64enc) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.customMetrics.enabled (not .Values.customMetrics.existingSecret) -}}
{{- with lookup "v1" "Secret" .Release.Namespace (printf "%s-custom-metrics" $name) -}}
{{- $_ := set $generated "customMetrics" .data -}}
{{- end -}}
{{- if not (hasKey $generated "customMetrics") -}}
{{- $host := printf "%s-custom-metrics.%s.svc" $name .Release.Namespace -}}
{{- /* The authority signs this one certificate; its key is not kept. */ -}}
{{- $authority := genCA (printf "%s-custom-metrics" $name) 3650 -}}
{{- $certificate := genSignedCert $host nil (list $host) 3650 $authority -}}
{{- $_ := set $generated "customMetrics" (dict "tls.crt" ($certificate.Cert | b64enc) "tls.key" ($certificate.Key | b64enc) "ca.crt" ($authority.Cert | b64enc)) -}}
{{- end -}}
{{- end -}}
{{- $_ := set .Values "generated" $generated -}}
{{- end -}}
{{- end -}}

{{- /* Refuses to take custom.metrics.k8s.io from somebody else. Every cluster has APIServices: where none is seen, nobody has looked. */ -}}
{{- define "voicepool.guardCustomMetrics" -}}
{{- if not .Values.customMetrics.force -}}
{{- $found := (lookup "apiregistration.k8s.io/v1" "APIService" "" "").items -}}
{{- if not $found -}}
{{- fail "customMetrics.enabled: this chart is rendered without a cluster, so it cannot see whether another server of custom.metrics.k8s.io (prometheus-adapter, a cloud's adapter) is registered, whose place it would take. See that there is none (kubectl get apiservices | grep custom.metrics.k8s.io), then set customMetrics.force=true" -}}
{{- end -}}
{{- range $found -}}
{{- if eq .spec.group "custom.metrics.k8s.io" -}}
{{- $annotations := .metadata.annotations | default dict -}}
{{- $release := printf "%s/%s" (index $annotations "meta.helm.sh/release-namespace" | default "") (index $annotations "meta.helm.sh/release-name" | default "") -}}
{{- if ne $release (printf "%s/%s" $.Release.Namespace $.Release.Name) -}}
{{- $server := "the API server itself" -}}
{{- with .spec.service -}}{{- $server = printf "the Service %s/%s" .namespace .name -}}{{- end -}}
{{- fail (printf "customMetrics.enabled: %s serves custom.metrics.k8s.io here already (APIService %s), and a cluster has one server of it for every HorizontalPodAutoscaler: taking its place would break the others. Leave customMetrics.enabled false and use KEDA, Prometheus or headroom.mode Native (docs/operations.md); or remove the other one; or, if you know that nobody uses it, set customMetrics.force=true" $server .metadata.name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
