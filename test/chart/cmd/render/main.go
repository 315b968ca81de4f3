// SPDX-License-Identifier: Apache-2.0

// Command render writes the objects of the Helm chart as YAML, as `helm
// template` would, for machines without helm:
//
//	go run ./test/chart/cmd/render -n latchkey -f values.yaml --set clusterName=test | kubectl apply -f -
package main

import (
	"flag"
	"fmt"
	"os"
	"strings"

	"github.com/latchkey-dev/latchkey/test/chart"
)

// list is a flag that may be repeated.
type list []string

func (l *list) String() string     { return strings.Join(*l, ",") }
func (l *list) Set(s string) error { *l = append(*l, s); return nil }

func main() {
	r := chart.Release{}
	var files, sets list
	flag.StringVar(&r.Chart, "chart", "deploy/chart/latchkey", "the chart's `directory`")
	flag.StringVar(&r.Name, "name", "latchkey", "`name` of the release")
	flag.StringVar(&r.Namespace, "n", "latchkey", "`namespace` of the release; it is not made")
	flag.Var(&files, "f", "values `file`; may be repeated")
	flag.Var(&sets, "set", "`key=value`; may be repeated")
	flag.StringVar(&r.KubeVersion, "kube-version", chart.DefaultKubeVersion, "Kubernetes `version` of the cluster")
	flag.Parse()
	if flag.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "render: unknown argument %q\n", flag.Arg(0))
		os.Exit(2)
	}
	if err := chart.Run(os.Stdout, r, files, sets); err != nil {
		fmt.Fprintln(os.Stderr, "render:", err)
		os.Exit(1)
	}
}
