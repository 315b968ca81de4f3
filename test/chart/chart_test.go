// SPDX-License-Identifier: Apache-2.0

package chart

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/lint"
	"helm.sh/helm/v3/pkg/lint/support"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"sigs.k8s.io/yaml"
)

const (
	root     = "../.."
	chartDir = root + "/deploy/chart/latchkey"
)

var update = flag.Bool("update", false, "write deploy/manifests and the golden files")

// render gives the objects of a release called latchkey, or the error.
func render(t *testing.T, namespace string, files []string, sets ...string) (string, error) {
	t.Helper()
	values, err := ReadValues(files, sets)
	if err != nil {
		t.Fatal(err)
	}
	return Render(Release{Chart: chartDir, Name: "latchkey", Namespace: namespace, Values: values})
}

// minimal are the values that nobody can do without.
var minimal = []string{"clusterName=prod", "env.AWS_REGION=us-west-2"}

func mustRender(t *testing.T, files []string, sets ...string) string {
	t.Helper()
	s, err := render(t, "latchkey", files, sets...)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func golden(t *testing.T, path, got string) {
	t.Helper()
	if *update {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatalf("%v; make manifests writes it", err)
	}
	if string(want) != got {
		a, b := strings.Split(string(want), "\n"), strings.Split(got, "\n")
		for i := range min(len(a), len(b)) {
			if a[i] != b[i] {
				t.Fatalf("%s, line %d:\nhas  %s\nwant %s\nIf that is right, make manifests writes it", path, i+1, a[i], b[i])
			}
		}
		t.Fatalf("%s has %d lines, want %d; if that is right, make manifests writes it", path, len(a), len(b))
	}
}

func TestLint(t *testing.T) {
	for _, sets := range [][]string{nil, minimal} {
		values, err := ReadValues(nil, sets)
		if err != nil {
			t.Fatal(err)
		}
		l := lint.AllWithKubeVersionAndSchemaValidation(chartDir, values, "latchkey", nil, false)
		for _, m := range l.Messages {
			if m.Severity >= support.WarningSev {
				t.Errorf("%v", m)
			}
		}
	}
}

func TestRenders(t *testing.T) {
	files, err := filepath.Glob("testdata/renders/*.values.yaml")
	if err != nil || len(files) < 3 {
		t.Fatalf("%v, %v", files, err)
	}
	for _, f := range files {
		name := strings.TrimSuffix(f, ".values.yaml")
		t.Run(filepath.Base(name), func(t *testing.T) {
			golden(t, name+".golden.yaml", mustRender(t, []string{f}))
		})
	}
}

// The static manifests are the chart's, for people without Helm.
func TestManifests(t *testing.T) {
	for name, namespace := range map[string]string{"agent": "kube-system", "server": "latchkey"} {
		s, err := render(t, namespace, []string{"testdata/manifests/" + name + ".values.yaml"})
		if err != nil {
			t.Fatal(err)
		}
		head := "# SPDX-License-Identifier: Apache-2.0\n#\n# Written by `make manifests` from deploy/chart/latchkey; do not edit.\n"
		if name == "agent" {
			head += "# Replace CLUSTER_NAME and REGION.\n"
		}
		s = strings.ReplaceAll(s, "app.kubernetes.io/managed-by: Helm", "app.kubernetes.io/managed-by: manifests")
		golden(t, root+"/deploy/manifests/"+name+".yaml", head+s)
	}
}

// typed decodes an object into Kubernetes's own type, so that a misspelt field
// is an error.
func typed(o map[string]any) (any, error) {
	types := map[string]any{
		"apps/v1 DaemonSet":                               &appsv1.DaemonSet{},
		"apps/v1 StatefulSet":                             &appsv1.StatefulSet{},
		"v1 Service":                                      &corev1.Service{},
		"v1 ServiceAccount":                               &corev1.ServiceAccount{},
		"v1 ConfigMap":                                    &corev1.ConfigMap{},
		"policy/v1 PodDisruptionBudget":                   &policyv1.PodDisruptionBudget{},
		"networking.k8s.io/v1 NetworkPolicy":              &networkingv1.NetworkPolicy{},
		"rbac.authorization.k8s.io/v1 ClusterRole":        &rbacv1.ClusterRole{},
		"rbac.authorization.k8s.io/v1 ClusterRoleBinding": &rbacv1.ClusterRoleBinding{},
		// Of custom resources there is no type here.
		"monitoring.coreos.com/v1 ServiceMonitor": &map[string]any{},
		"cert-manager.io/v1 Certificate":          &map[string]any{},
	}
	kind := fmt.Sprint(o["apiVersion"], " ", o["kind"])
	into, ok := types[kind]
	if !ok {
		return nil, fmt.Errorf("unexpected %s", kind)
	}
	b, err := json.Marshal(o)
	if err != nil {
		return nil, err
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	return into, d.Decode(into)
}

// objects decodes a render, all of whose objects are valid and in the release's
// namespace.
func objects(t *testing.T, stream string) []any {
	t.Helper()
	docs, err := Objects(stream)
	if err != nil {
		t.Fatal(err)
	}
	var out []any
	seen := map[string]bool{}
	for _, o := range docs {
		v, err := typed(o)
		if err != nil {
			t.Errorf("%v: %v", o["kind"], err)
			continue
		}
		meta, _ := o["metadata"].(map[string]any)
		id := fmt.Sprint(o["kind"], "/", meta["name"])
		if seen[id] {
			t.Errorf("%s is there twice", id)
		}
		seen[id] = true
		if ns := meta["namespace"]; ns == nil != strings.HasPrefix(fmt.Sprint(o["kind"]), "Cluster") {
			t.Errorf("%s: namespace %v", id, ns)
		}
		out = append(out, v)
	}
	return out
}

func daemonSets(t *testing.T, stream string) []*appsv1.DaemonSet {
	t.Helper()
	var out []*appsv1.DaemonSet
	for _, o := range objects(t, stream) {
		if d, ok := o.(*appsv1.DaemonSet); ok {
			out = append(out, d)
		}
	}
	return out
}

// agentOf is the only DaemonSet's pod and its main container.
func agentOf(t *testing.T, stream string) (*appsv1.DaemonSet, *corev1.Container) {
	t.Helper()
	ds := daemonSets(t, stream)
	if len(ds) != 1 || len(ds[0].Spec.Template.Spec.Containers) != 1 {
		t.Fatalf("%d DaemonSets", len(ds))
	}
	return ds[0], &ds[0].Spec.Template.Spec.Containers[0]
}

func TestEveryRenderIsValid(t *testing.T) {
	files, err := filepath.Glob("testdata/*/*.values.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		t.Run(filepath.Base(f), func(t *testing.T) {
			for _, o := range objects(t, mustRender(t, []string{f})) {
				switch o := o.(type) {
				case *appsv1.DaemonSet:
					checkPod(t, o.Name, &o.Spec.Template, nil)
				case *appsv1.StatefulSet:
					var claims []string
					for _, c := range o.Spec.VolumeClaimTemplates {
						claims = append(claims, c.Name)
					}
					checkPod(t, o.Name, &o.Spec.Template, claims)
				}
			}
		})
	}
}

// checkPod holds for both halves: every volume is used and every mount has one,
// nothing is writable or gained that need not be.
func checkPod(t *testing.T, name string, p *corev1.PodTemplateSpec, claims []string) {
	t.Helper()
	volumes := map[string]bool{}
	for _, c := range claims {
		volumes[c] = false
	}
	for _, v := range p.Spec.Volumes {
		volumes[v.Name] = false
	}
	for _, c := range slices.Concat(p.Spec.InitContainers, p.Spec.Containers) {
		for _, m := range c.VolumeMounts {
			if _, ok := volumes[m.Name]; !ok {
				t.Errorf("%s: %s mounts %s, which is no volume", name, c.Name, m.Name)
			}
			volumes[m.Name] = true
		}
		if s := c.SecurityContext; s == nil || s.ReadOnlyRootFilesystem == nil || !*s.ReadOnlyRootFilesystem {
			t.Errorf("%s: %s can write to its root", name, c.Name)
		}
	}
	for v, used := range volumes {
		if !used {
			t.Errorf("%s: nobody mounts %s", name, v)
		}
	}
	for _, c := range p.Spec.Containers {
		s := c.SecurityContext
		if s.Privileged != nil && *s.Privileged || s.AllowPrivilegeEscalation == nil || *s.AllowPrivilegeEscalation {
			t.Errorf("%s: %s may gain privileges", name, c.Name)
		}
		if s.Capabilities == nil || !slices.Contains(s.Capabilities.Drop, "ALL") {
			t.Errorf("%s: %s keeps capabilities", name, c.Name)
		}
	}
	if a := p.Spec.AutomountServiceAccountToken; a == nil || *a {
		t.Errorf("%s: a service account token is mounted unasked", name)
	}
}

// The capabilities are those of the table in docs/privileges.md.
func TestCapabilities(t *testing.T) {
	doc, err := os.ReadFile(root + "/docs/privileges.md")
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	for _, m := range regexp.MustCompile("(?m)^\\| `CAP_([A-Z_]+)` \\|").FindAllStringSubmatch(string(doc), -1) {
		// For kernels before 5.11; a value adds it.
		if m[1] != "SYS_RESOURCE" {
			want = append(want, m[1])
		}
	}
	ds, c := agentOf(t, mustRender(t, nil, minimal...))
	var got []string
	for _, k := range c.SecurityContext.Capabilities.Add {
		got = append(got, string(k))
	}
	slices.Sort(want)
	slices.Sort(got)
	if len(want) == 0 || !slices.Equal(got, want) {
		t.Errorf("capabilities %v, want %v as in docs/privileges.md", got, want)
	}
	p := ds.Spec.Template.Spec
	if !p.HostNetwork || !p.HostPID || p.PriorityClassName != "system-node-critical" {
		t.Errorf("hostNetwork %v, hostPID %v, priority %s", p.HostNetwork, p.HostPID, p.PriorityClassName)
	}
	if len(p.Tolerations) != 1 || p.Tolerations[0].Operator != corev1.TolerationOpExists || p.Tolerations[0].Key != "" {
		t.Errorf("tolerations %v", p.Tolerations)
	}
	if u := ds.Spec.UpdateStrategy.RollingUpdate; u == nil || u.MaxUnavailable.String() != "10%" || u.MaxSurge != nil {
		t.Errorf("update strategy %+v", ds.Spec.UpdateStrategy)
	}
	if c.SecurityContext.SeccompProfile == nil || c.SecurityContext.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault {
		t.Errorf("seccomp %+v", c.SecurityContext.SeccompProfile)
	}
	// A port that is named is one that the scheduler guards.
	if len(c.Ports) != 0 {
		t.Errorf("ports %v", c.Ports)
	}
	// Its account may do nothing: no object binds a role to it.
	for _, o := range objects(t, mustRender(t, nil, minimal...)) {
		if _, ok := o.(*rbacv1.ClusterRoleBinding); ok {
			t.Errorf("a role is bound: %+v", o)
		}
	}
}

// Every flag that the chart or the unit can give is one that the programs have.
// docs/flags.md and docs/server-flags.md are compared with the code elsewhere.
func TestFlagsExist(t *testing.T) {
	known := func(name string) string {
		b, err := os.ReadFile(root + "/docs/" + name)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	agentDoc, serverDoc := known("flags.md"), known("server-flags.md")
	check := func(doc, where string, args []string) {
		for _, a := range args {
			name, _, _ := strings.Cut(a, "=")
			if strings.HasPrefix(name, "--") && !strings.Contains(doc, "`"+name+"`") && !strings.Contains(doc, ", "+name+"`") {
				t.Errorf("%s: %s is no flag", where, name)
			}
		}
	}
	files, err := filepath.Glob("testdata/*/*.values.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		for _, o := range objects(t, mustRender(t, []string{f})) {
			switch o := o.(type) {
			case *appsv1.DaemonSet:
				for _, c := range slices.Concat(o.Spec.Template.Spec.InitContainers, o.Spec.Template.Spec.Containers) {
					check(agentDoc, f, c.Args)
				}
			case *appsv1.StatefulSet:
				check(serverDoc, f, o.Spec.Template.Spec.Containers[0].Args)
			}
		}
	}
	units, err := filepath.Glob(root + "/deploy/systemd/*.service")
	if err != nil || len(units) == 0 {
		t.Fatalf("%v, %v", units, err)
	}
	for _, u := range units {
		b, err := os.ReadFile(u)
		if err != nil {
			t.Fatal(err)
		}
		doc := agentDoc
		if strings.HasSuffix(u, "/latchkey-server.service") {
			doc = serverDoc
		}
		check(doc, u, regexp.MustCompile(`--[a-z-]+`).FindAllString(commands(string(b)), -1))
	}
}

// commands are the lines of a unit that run something.
func commands(unit string) string {
	var out []string
	for line := range strings.Lines(strings.ReplaceAll(unit, "\\\n", " ")) {
		if strings.HasPrefix(line, "Exec") {
			out = append(out, line)
		}
	}
	return strings.Join(out, "")
}

// A values file of the EKS Pod Identity Agent's chart says the same here.
func TestEKSChartValues(t *testing.T) {
	ds := daemonSets(t, mustRender(t, []string{"testdata/renders/eks-chart-values.values.yaml"}))
	if len(ds) != 3 {
		t.Fatalf("%d DaemonSets", len(ds))
	}
	byName := map[string]*appsv1.DaemonSet{}
	selectors := map[string]bool{}
	for _, d := range ds {
		byName[d.Name] = d
		selectors[fmt.Sprint(d.Spec.Selector.MatchLabels)] = true
	}
	if len(selectors) != 3 {
		t.Error("two DaemonSets would fight for the same pods")
	}
	d := byName["eks-pod-identity-agent"]
	if d == nil || byName["eks-pod-identity-agent-hybrid"] == nil || byName["eks-pod-identity-agent-hybrid-bottlerocket"] == nil {
		t.Fatalf("names %v", slices.Collect(maps.Keys(byName)))
	}
	p := d.Spec.Template.Spec
	c := p.Containers[0]
	for _, want := range []string{"--cluster-name=prod", "--probe-port=2713", "--metrics-port=2715", "-b=169.254.170.23", "-v=trace", "--max-cache-size=4000"} {
		if !slices.Contains(c.Args, want) {
			t.Errorf("no %s in %v", want, c.Args)
		}
	}
	if c.Image != "registry.internal/latchkey:0.1.0" || c.ImagePullPolicy != corev1.PullAlways || len(c.Command) != 0 || len(p.InitContainers[0].Command) != 0 {
		t.Errorf("image %s, %s, command %v %v", c.Image, c.ImagePullPolicy, c.Command, p.InitContainers[0].Command)
	}
	if !slices.Contains(p.InitContainers[0].Args, "-v=trace") {
		t.Errorf("init %v", p.InitContainers[0].Args)
	}
	if !slices.Contains(c.Env, corev1.EnvVar{Name: "HTTPS_PROXY", Value: "http://proxy.internal:3128"}) {
		t.Errorf("environment %v", c.Env)
	}
	if len(c.Ports) != 1 || c.Ports[0].ContainerPort != 80 {
		t.Errorf("ports %v", c.Ports)
	}
	if p.NodeSelector["pool"] != "workers" || p.Tolerations[0].Key != "dedicated" || p.ImagePullSecrets[0].Name != "registry" ||
		d.Spec.Template.Labels["team"] != "platform" || d.Spec.Template.Annotations["prometheus.io/port"] != "2715" ||
		c.Resources.Limits.Memory().String() != "128Mi" || d.Spec.UpdateStrategy.RollingUpdate.MaxUnavailable.String() != "25%" {
		t.Errorf("got %+v", d.Spec)
	}
	for _, suffix := range []string{"-hybrid", "-hybrid-bottlerocket"} {
		d := byName["eks-pod-identity-agent"+suffix]
		c := d.Spec.Template.Spec.Containers[0]
		if !slices.Contains(c.Args, "--rotate-credentials=true") {
			t.Errorf("%s: %v", suffix, c.Args)
		}
		if !slices.ContainsFunc(c.VolumeMounts, func(m corev1.VolumeMount) bool { return m.MountPath == "/root/.aws" && m.ReadOnly }) {
			t.Errorf("%s: %v", suffix, c.VolumeMounts)
		}
		// Where the agent looks for them: the image has no user that has a home.
		if !slices.Contains(c.Env, corev1.EnvVar{Name: "HOME", Value: "/root"}) {
			t.Errorf("%s: the mounted credentials are not found: environment %v", suffix, c.Env)
		}
	}
	if s := byName["eks-pod-identity-agent-hybrid-bottlerocket"].Spec.Template.Spec.Containers[0].SecurityContext; s.SELinuxOptions == nil || s.SELinuxOptions.Type == "" {
		t.Errorf("SELinux on Bottlerocket: %+v", s)
	}
}

func TestValuesThatAreRefused(t *testing.T) {
	for sets, want := range map[string]string{
		// The schema's.
		"atestation=off":                               "additional properties 'atestation' not allowed",
		"agent.additionalArg.x=1":                      "at '/agent': additional properties 'additionalArg' not allowed",
		"agent.attestation.mode=permissive":            "at '/agent/attestation/mode': value must be one of 'enforce', 'audit', 'off'",
		"agent.attestation.namespaces.web=on":          "at '/agent/attestation/namespaces/web': value must be one of 'enforce'",
		"updateStrategy.rollingUpdate.maxSurge=1":      "at '/updateStrategy/rollingUpdate/maxSurge': value must be one of 0",
		"updateStrategy.rollingUpdate.maxSurge=10%":    "at '/updateStrategy/rollingUpdate/maxSurge': value must be one of 0",
		"updateStrategy.type=Recreate":                 "value must be one of 'RollingUpdate', 'OnDelete'",
		"agent.port=http":                              "at '/agent/port': got string, want integer",
		"agent.port=70000":                             "at '/agent/port': maximum: got 70,000, want 65,535",
		"agent.additionalArgs.verbosity=debug":         "'verbosity' does not match pattern",
		"agent.hostPaths.bpffs=bpf":                    "at '/agent/hostPaths/bpffs'",
		"agent.endpoint=latchkey:8443":                 "at '/agent/endpoint'",
		"agent.tokenKeys.source=jwks":                  "value must be one of 'apiServer', 'issuer', 'file', 'none'",
		"agent.audit=syslog":                           "at '/agent/audit'",
		"agent.nodeAuth.expirationSeconds=60":          "minimum: got 60, want 600",
		"image.pullPolicy=Sometimes":                   "at '/image/pullPolicy'",
		"clusterName=a b":                              "at '/clusterName'",
		"daemonsets.fargate.create=true":               "at '/daemonsets': additional properties 'fargate' not allowed",
		"metrics.serviceMonitor.interval=often":        "at '/metrics/serviceMonitor/interval'",
		"server.replicas=3":                            "at '/server': additional properties 'replicas' not allowed",
		"agent.appArmorProfile.type=Localhost":         "at '/agent/appArmorProfile/type'",
		"server.persistence.size=big":                  "at '/server/persistence/size'",
		"server.networkPolicy.from=x":                  "at '/server/networkPolicy': additional properties 'from' not allowed",
		"server.podDisruptionBudget.minAvailable=1":    "additional properties 'minAvailable' not allowed",
		"agent.runtime.hostPaths={run/containerd}":     "at '/agent/runtime/hostPaths/0'",
		"server.tls.certManager.issuer=x":              "additional properties 'issuer' not allowed",
		"agent.caBundle.file=x":                        "at '/agent/caBundle': additional properties 'file' not allowed",
		"serviceAccount.token=true":                    "at '/serviceAccount': additional properties 'token' not allowed",
		"agent.additionalCapabilities={sys_admin}":     "at '/agent/additionalCapabilities/0'",
		"agent.terminationGracePeriodSeconds=0":        "minimum: got 0, want 1",
		"podLabels=x":                                  "at '/podLabels': got string, want null or object",
		"tolerations=x":                                "at '/tolerations'",
		"agent.seccompProfile=RuntimeDefault":          "at '/agent/seccompProfile'",
		"agent.sendNodeName=sometimes":                 "at '/agent/sendNodeName': got string, want boolean",
		"agent.dnsPolicy=None":                         "at '/agent/dnsPolicy'",
		"init.image=x":                                 "at '/init': additional properties 'image' not allowed",
		"server.service.type=ExternalName":             "at '/server/service/type'",
		"image.digest=sha256:12":                       "at '/image/digest'",
		"nodeSelector=x":                               "at '/nodeSelector'",
		"agent.livenessEndpoint=healthz":               "at '/agent/livenessEndpoint'",
		"server.config=x":                              "at '/server/config'",
		"daemonsets.cloud.nameSuffix=Big":              "at '/daemonsets/cloud/nameSuffix'",
		"server.metricsPort=0":                         "at '/server/metricsPort'",
		"fullnameOverride=7":                           "at '/fullnameOverride'",
		"agent.probePort=-1":                           "at '/agent/probePort'",
		"server.tokenReview=true":                      "at '/server/tokenReview': got boolean, want object",
		"server.metrics.serviceMonitor.scrape=true":    "additional properties 'scrape' not allowed",
		"agent.volumes=x":                              "at '/agent/volumes'",
		"updateStrategy.rollingUpdate.partition=1":     "additional properties 'partition' not allowed",
		"server.persistence.accessModes={}":            "at '/server/persistence/accessModes",
		"agent.tokenKeys.issuer=kubernetes.svc":        "at '/agent/tokenKeys/issuer'",
		"agent.cleanupOnExit=yes":                      "at '/agent/cleanupOnExit': got string, want boolean",
		"server.priorityClassName=null,agent.port=0":   "at '/agent/port'",
		"server.terminationGracePeriodSeconds=forever": "at '/server/terminationGracePeriodSeconds'",
		// The templates', which say what the schema cannot.
		"clusterName=":    "clusterName: give the cluster's name",
		"env=null":        "at '': missing property 'env'",
		"env.AWS_REGION=": "env.AWS_REGION: give the cluster's region",
		"image.containerRegistry=602401143452.dkr.ecr.us-west-2.amazonaws.com":                   "is the image of the EKS Pod Identity Agent",
		"image.override=x/eks/eks-pod-identity-agent:v0.1.20":                                    "is the image of the EKS Pod Identity Agent",
		"agent.nodeAuth.enabled=true":                                                            "give its URL as agent.endpoint, or set server.enabled",
		"agent.tokenKeys.source=issuer":                                                          "agent.tokenKeys.issuer: source issuer needs it",
		"agent.tokenKeys.source=file,agent.tokenKeys.issuer=https://x":                           "agent.tokenKeys.configMap.name: source file needs it",
		"server.enabled=true":                                                                    "server.tls: give secretName",
		"server.enabled=true,server.tls.certManager.enabled=true":                                "server.tls.certManager.issuerRef: give the issuer's name and kind",
		"daemonsets.hybrid.create=true,daemonsets.hybrid.nameSuffix=":                            "daemonsets.hybrid.nameSuffix: \"\" is that of cloud",
		"server.enabled=true,server.tls.secretName=x,server.metrics.serviceMonitor.enabled=true": "server.networkPolicy.metricsFrom: nobody may ask for metrics",
	} {
		t.Run(sets, func(t *testing.T) {
			all := append(slices.Clone(minimal), sets)
			s, err := render(t, "latchkey", nil, all...)
			if err == nil {
				t.Fatalf("accepted; rendered %d bytes", len(s))
			}
			if !strings.Contains(err.Error(), want) {
				t.Errorf("got:\n%v\nwant %s", err, want)
			}
		})
	}
}

// If the schema is not asked, the template still says why.
func TestSurgeIsExplained(t *testing.T) {
	c, err := loader.LoadDir(chartDir)
	if err != nil {
		t.Fatal(err)
	}
	c.Schema = nil
	values, err := ReadValues(nil, append(slices.Clone(minimal), "updateStrategy.rollingUpdate.maxSurge=1"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := renderChart(c, Release{Name: "latchkey", Namespace: "latchkey", Values: values}); err == nil || !strings.Contains(err.Error(), "two agents cannot listen on one node") {
		t.Errorf("got %v", err)
	}
}

func TestValuesThatAreAccepted(t *testing.T) {
	for _, sets := range []string{
		"updateStrategy.rollingUpdate.maxSurge=0",
		"updateStrategy.type=OnDelete,updateStrategy.rollingUpdate=null",
		"global.anything=1",
		"image.region=us-west-2",
		"image.digest=sha256:" + strings.Repeat("0", 64),
		"daemonsets.hybrid=null",
		"agent.additionalArgs=null",
		"agent.additionalArgs.--stand-alone=null",
		"image.tag=1",
		"server.enabled=true,server.tls.insecureHTTP=true",
		"server.enabled=true,server.tls.secretName=x,server.persistence.enabled=false",
		"agent.enabled=false",
		"agent.appArmorProfile=null,agent.seccompProfile=null",
		"fullnameOverride=pod-identity",
		"env.HOME=/var/agent",
		"server.enabled=true,server.tls.secretName=x,server.metrics.serviceMonitor.enabled=true,server.networkPolicy.enabled=false",
		"env.AWS_REGION=us-iso-east-1",
	} {
		t.Run(sets, func(t *testing.T) {
			objects(t, mustRender(t, nil, append(slices.Clone(minimal), sets)...))
		})
	}
}

// keys are the paths of all values that are no lists and no free maps.
func keys(prefix string, v any, out map[string]bool) {
	m, ok := v.(map[string]any)
	if !ok || len(m) == 0 {
		out[prefix] = true
		return
	}
	for k, v := range m {
		keys(prefix+"/"+k, v, out)
	}
}

// Every value is in the schema, and what the schema allows has a default to read.
func TestSchemaAndValuesAgree(t *testing.T) {
	b, err := os.ReadFile(chartDir + "/values.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var values map[string]any
	if err := yaml.Unmarshal(b, &values); err != nil {
		t.Fatal(err)
	}
	if b, err = os.ReadFile(chartDir + "/values.schema.json"); err != nil {
		t.Fatal(err)
	}
	var schema map[string]any
	if err := json.Unmarshal(b, &schema); err != nil {
		t.Fatal(err)
	}
	resolve := func(s map[string]any) map[string]any {
		if ref, ok := s["$ref"].(string); ok {
			return schema["definitions"].(map[string]any)[strings.TrimPrefix(ref, "#/definitions/")].(map[string]any)
		}
		return s
	}
	// Without a default: of other charts, or not for all kinds of nodes.
	optional := regexp.MustCompile(`^/(global|.*image/region|daemonsets/[^/]+/(additionalArgs|affinity|additionalSecurityContext|volumes|volumeMounts)|updateStrategy/rollingUpdate/maxSurge|agent/additionalArgs|.*issuerRef)$`)
	var walk func(path string, s map[string]any, v any)
	walk = func(path string, s map[string]any, v any) {
		s = resolve(s)
		props, ok := s["properties"].(map[string]any)
		if !ok {
			return
		}
		if s["additionalProperties"] != false {
			t.Errorf("%s: other keys are allowed", path)
		}
		m, _ := v.(map[string]any)
		for k, p := range props {
			value, ok := m[k]
			if !ok && !optional.MatchString(path+"/"+k) {
				t.Errorf("%s/%s is in the schema and not in values.yaml", path, k)
			}
			if ok {
				walk(path+"/"+k, p.(map[string]any), value)
			}
		}
	}
	walk("", schema, values)
	// The other way round, the schema itself refuses: TestRenders uses all.
	leaves := map[string]bool{}
	keys("", values, leaves)
	if len(leaves) < 80 {
		t.Errorf("only %d values", len(leaves))
	}
	doc, err := os.ReadFile(root + "/docs/install.md")
	if err != nil {
		t.Fatal(err)
	}
	for k := range values {
		if !strings.Contains(string(doc), "`"+k) {
			t.Errorf("docs/install.md does not speak of %s", k)
		}
	}
}

// Agents use the server of the same release without more being said.
func TestBothHalves(t *testing.T) {
	stream := mustRender(t, []string{"testdata/renders/both-halves.values.yaml"})
	ds, c := agentOf(t, stream)
	for _, want := range []string{"--endpoint=https://latchkey-server.latchkey.svc:8443", "--node-token-file=/var/run/secrets/latchkey/node-token", "--metrics-port=0", "--containerd-socket=off"} {
		if !slices.Contains(c.Args, want) {
			t.Errorf("no %s in %v", want, c.Args)
		}
	}
	if ds.Spec.Template.Spec.DNSPolicy != corev1.DNSClusterFirstWithHostNet {
		t.Errorf("DNS policy %s: the server's name is the cluster's", ds.Spec.Template.Spec.DNSPolicy)
	}
	for _, v := range ds.Spec.Template.Spec.Volumes {
		if v.Secret != nil && (len(v.Secret.Items) != 1 || v.Secret.Items[0].Key != "ca.crt") {
			t.Errorf("more of the server's Secret than its CA is on the nodes: %+v", v.Secret)
		}
		if v.Projected == nil {
			continue
		}
		for _, s := range v.Projected.Sources {
			if s.ServiceAccountToken != nil && s.ServiceAccountToken.Audience != "latchkey-server" {
				t.Errorf("a token of audience %q although no key is asked for with it", s.ServiceAccountToken.Audience)
			}
		}
	}
	var server *appsv1.StatefulSet
	for _, o := range objects(t, stream) {
		if s, ok := o.(*appsv1.StatefulSet); ok {
			server = s
		}
	}
	if server == nil || *server.Spec.Replicas != 1 {
		t.Fatalf("server %+v", server)
	}
}

func TestAppArmorBefore130(t *testing.T) {
	values, err := ReadValues(nil, minimal)
	if err != nil {
		t.Fatal(err)
	}
	s, err := Render(Release{Chart: chartDir, Name: "latchkey", Namespace: "latchkey", Values: values, KubeVersion: "v1.29.3"})
	if err != nil {
		t.Fatal(err)
	}
	ds, c := agentOf(t, s)
	if c.SecurityContext.AppArmorProfile != nil || ds.Spec.Template.Annotations["container.apparmor.security.beta.kubernetes.io/agent"] != "unconfined" {
		t.Errorf("annotations %v, profile %v", ds.Spec.Template.Annotations, c.SecurityContext.AppArmorProfile)
	}
	ds, c = agentOf(t, mustRender(t, nil, minimal...))
	if c.SecurityContext.AppArmorProfile == nil || len(ds.Spec.Template.Annotations) != 0 {
		t.Errorf("annotations %v, profile %v", ds.Spec.Template.Annotations, c.SecurityContext.AppArmorProfile)
	}
}

func TestNotes(t *testing.T) {
	values, err := ReadValues(nil, append(slices.Clone(minimal), "agent.attestation.mode=audit"))
	if err != nil {
		t.Fatal(err)
	}
	got, err := Notes(Release{Chart: chartDir, Name: "latchkey", Namespace: "latchkey", Values: values})
	if err != nil || !strings.Contains(got, "cleanupOnExit") || !strings.Contains(got, "a stolen token is served") {
		t.Errorf("%v: %s", err, got)
	}
	for sets, want := range map[string]string{
		"server.tls.secretName=x":      "The server is https://latchkey-server.latchkey.svc:8443",
		"server.tls.insecureHTTP=true": "The server is http://latchkey-server.latchkey.svc:8443",
	} {
		if values, err = ReadValues(nil, append(slices.Clone(minimal), "server.enabled=true", sets)); err != nil {
			t.Fatal(err)
		}
		if got, err = Notes(Release{Chart: chartDir, Name: "latchkey", Namespace: "latchkey", Values: values}); err != nil || !strings.Contains(got, want) {
			t.Errorf("%s: %v: %s", sets, err, got)
		}
	}
}

// The render program's way: files first, then settings.
func TestRun(t *testing.T) {
	var b bytes.Buffer
	r := Release{Chart: chartDir, Name: "x", Namespace: "y"}
	if err := Run(&b, r, []string{"testdata/renders/k3s.values.yaml"}, []string{"clusterName=other"}); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(b.String(), "--cluster-name=other") || !strings.Contains(b.String(), "name: x-latchkey-agent") {
		t.Errorf("got %s", b.String())
	}
	if err := Run(&b, r, []string{"testdata/none.yaml"}, nil); err == nil {
		t.Error("a file that is not there")
	}
	if err := Run(&b, r, nil, []string{"a=b=c,d"}); err == nil {
		t.Error("a setting that is none")
	}
}

// What a value says reaches the agent as it is, whatever it would mean to YAML.
func TestTextsOfValuesAreKept(t *testing.T) {
	values, err := ReadValues(nil, minimal)
	if err != nil {
		t.Fatal(err)
	}
	const odd = `a "b" 'c' {d}, [e] # f: g\h %i`
	values["env"] = map[string]any{"AWS_REGION": "us-west-2", "ODD": odd, "NUMBER": 12345678, "BOOL": true, "HOME": "/var/agent"}
	values["podAnnotations"] = map[string]any{"odd": odd}
	values["agent"] = map[string]any{
		"audit":          "file:/" + odd,
		"endpoint":       "https://" + odd,
		"hostPaths":      map[string]any{"run": "/" + odd, "cgroup": "/cg, roup"},
		"runtime":        map[string]any{"hostPaths": []any{"/" + odd}},
		"caBundle":       map[string]any{"hostPath": "/" + odd},
		"additionalArgs": map[string]any{"--state-dir": odd, "--max-cache-bytes": 1234567890},
	}
	s, err := Render(Release{Chart: chartDir, Name: "latchkey", Namespace: "latchkey", Values: values})
	if err != nil {
		t.Fatal(err)
	}
	ds, c := agentOf(t, s)
	for _, want := range []string{"--audit=file:/" + odd, "--endpoint=https://" + odd, "--state-dir=" + odd, "--max-cache-bytes=1234567890"} {
		if !slices.Contains(c.Args, want) {
			t.Errorf("no %s in %q", want, c.Args)
		}
	}
	for name, want := range map[string]string{"ODD": odd, "NUMBER": "12345678", "BOOL": "true", "HOME": "/var/agent"} {
		if !slices.Contains(c.Env, corev1.EnvVar{Name: name, Value: want}) {
			t.Errorf("no %s=%s in %v", name, want, c.Env)
		}
	}
	if slices.ContainsFunc(c.Env, func(e corev1.EnvVar) bool { return e.Value == "/root" }) {
		t.Errorf("a second HOME in %v", c.Env)
	}
	paths := map[string]string{}
	for _, v := range ds.Spec.Template.Spec.Volumes {
		if v.HostPath != nil {
			paths[v.Name] = v.HostPath.Path
		}
	}
	for name, want := range map[string]string{"run": "/" + odd, "cgroup": "/cg, roup", "runtime-0": "/" + odd, "ca": "/" + odd} {
		if paths[name] != want {
			t.Errorf("volume %s is %q", name, paths[name])
		}
	}
	if ds.Spec.Template.Annotations["odd"] != odd {
		t.Errorf("annotations %q", ds.Spec.Template.Annotations)
	}
}
