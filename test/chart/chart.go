// SPDX-License-Identifier: Apache-2.0

// Package chart renders the Helm chart below deploy/chart with Helm's own
// library, so that its tests, and the suites on a real cluster, need no helm
// command.
package chart

import (
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"

	helmchart "helm.sh/helm/v3/pkg/chart"
	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/engine"
	"helm.sh/helm/v3/pkg/releaseutil"
	"helm.sh/helm/v3/pkg/strvals"
	"sigs.k8s.io/yaml"
)

// Release is what `helm template` is told.
type Release struct {
	// Chart is the chart's directory.
	Chart string
	// Name and Namespace are the release's.
	Name, Namespace string
	// Values override the chart's own.
	Values map[string]any
	// KubeVersion is the cluster's; empty means DefaultKubeVersion.
	KubeVersion string
}

// DefaultKubeVersion is what is rendered for where nothing else is said: not the
// library's own, which moves with it.
const DefaultKubeVersion = "v1.33.0"

// values are the template's: the chart's and the release's, checked by the
// schema.
func (r Release) values(c *helmchart.Chart) (chartutil.Values, error) {
	version := r.KubeVersion
	if version == "" {
		version = DefaultKubeVersion
	}
	kube, err := chartutil.ParseKubeVersion(version)
	if err != nil {
		return nil, err
	}
	caps := chartutil.DefaultCapabilities.Copy()
	caps.KubeVersion = *kube
	options := chartutil.ReleaseOptions{Name: r.Name, Namespace: r.Namespace, Revision: 1, IsInstall: true}
	// A copy: Helm writes into what it is given.
	return chartutil.ToRenderValues(c, chartutil.CoalesceTables(map[string]any{}, r.Values), options, caps)
}

// ReadValues reads values files, later ones over earlier ones, and then settings
// as in `--set a.b=c`.
func ReadValues(files, sets []string) (map[string]any, error) {
	values := map[string]any{}
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			return nil, err
		}
		more := map[string]any{}
		if err := yaml.Unmarshal(data, &more); err != nil {
			return nil, fmt.Errorf("%s: %w", f, err)
		}
		values = chartutil.CoalesceTables(more, values)
	}
	for _, s := range sets {
		if err := strvals.ParseInto(s, values); err != nil {
			return nil, fmt.Errorf("--set %s: %w", s, err)
		}
	}
	return values, nil
}

// Render returns the objects as one YAML stream, in the order in which Helm
// installs them. Errors are Helm's: those of the schema name the key.
func Render(r Release) (string, error) {
	c, err := loader.LoadDir(r.Chart)
	if err != nil {
		return "", err
	}
	return renderChart(c, r)
}

func renderChart(c *helmchart.Chart, r Release) (string, error) {
	vals, err := r.values(c)
	if err != nil {
		return "", err
	}
	files, err := engine.Render(c, vals)
	if err != nil {
		return "", err
	}
	maps.DeleteFunc(files, func(name, _ string) bool { return strings.HasSuffix(name, "NOTES.txt") })
	_, manifests, err := releaseutil.SortManifests(files, nil, releaseutil.InstallOrder)
	if err != nil {
		return "", err
	}
	var b strings.Builder
	for _, m := range manifests {
		fmt.Fprintf(&b, "---\n# Source: %s\n%s\n", m.Name, strings.TrimSpace(m.Content))
	}
	return b.String(), nil
}

// Notes returns what Helm prints after the installation.
func Notes(r Release) (string, error) {
	c, err := loader.LoadDir(r.Chart)
	if err != nil {
		return "", err
	}
	vals, err := r.values(c)
	if err != nil {
		return "", err
	}
	files, err := engine.Render(c, vals)
	if err != nil {
		return "", err
	}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if strings.HasSuffix(name, "NOTES.txt") {
			return files[name], nil
		}
	}
	return "", nil
}

// Objects reads a YAML stream.
func Objects(stream string) ([]map[string]any, error) {
	var out []map[string]any
	for _, doc := range strings.Split("\n"+stream, "\n---\n") {
		if strings.TrimSpace(doc) == "" {
			continue
		}
		var o map[string]any
		if err := yaml.UnmarshalStrict([]byte(doc), &o); err != nil {
			return nil, fmt.Errorf("%w in:\n%s", err, doc)
		}
		if len(o) > 0 {
			out = append(out, o)
		}
	}
	return out, nil
}

// Run is the render program: it writes what a release would install.
func Run(out io.Writer, r Release, files, sets []string) error {
	values, err := ReadValues(files, sets)
	if err != nil {
		return err
	}
	r.Values = values
	s, err := Render(r)
	if err != nil {
		return err
	}
	_, err = io.WriteString(out, s)
	return err
}
