// SPDX-License-Identifier: Apache-2.0

// Report reads the logs of scripts/kernel-matrix.
//
//	report lines [-not-here FILE] KERNEL LOG       one line for each test; status 1 if one failed
//	report docs [-not-here FILE] -o FILE KERNEL=LOG...  writes docs/kernels.md
//	report verifier -o FILE KERNEL=LOG...          takes the verifier's counts over as the new baseline
package main

import (
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/latchkey-dev/latchkey/test/kernel"
)

var errFailed = errors.New("not every test passed")

func main() {
	err := run(os.Args[1:])
	if errors.Is(err, errFailed) {
		os.Exit(1)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "report:", err)
		os.Exit(2)
	}
}

func run(args []string) error {
	if len(args) == 0 {
		return errors.New("say lines, docs or verifier")
	}
	flags := flag.NewFlagSet(args[0], flag.ContinueOnError)
	leftOut := flags.String("not-here", "", "list of the tests left out")
	output := flags.String("o", "", "file to write")
	if err := flags.Parse(args[1:]); err != nil {
		return err
	}
	switch args[0] {
	case "lines":
		if flags.NArg() != 2 {
			return errors.New("lines needs a kernel's name and its log")
		}
		r, err := load(flags.Arg(0), flags.Arg(1), *leftOut)
		if err != nil {
			return err
		}
		return lines(&r)
	case "docs":
		runs, err := loadAll(flags.Args(), *leftOut)
		if err != nil {
			return err
		}
		previous, err := os.ReadFile(*output)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return os.WriteFile(*output, []byte(kernel.Document(runs, string(previous))), 0o644)
	case "verifier":
		runs, err := loadAll(flags.Args(), "")
		if err != nil {
			return err
		}
		text, err := os.ReadFile(*output)
		if err != nil {
			return err
		}
		baseline, err := kernel.ParseBaseline(string(text))
		if err != nil {
			return err
		}
		for i := range runs {
			baseline.Update(&runs[i])
		}
		return os.WriteFile(*output, []byte(baseline.String()), 0o644)
	}
	return fmt.Errorf("no %s: say lines, docs or verifier", args[0])
}

func lines(r *kernel.Run) error {
	for _, x := range r.Results {
		if x.Outcome == kernel.Fail && len(x.Output) > 0 {
			fmt.Fprintf(os.Stderr, "--- kernel %s, %s %s, its last words:\n%s\n", r.Kernel, x.Package, x.Test, strings.Join(x.Output, "\n"))
		}
	}
	if err := r.WriteLines(os.Stdout); err != nil {
		return err
	}
	if r.Failed() {
		return errFailed
	}
	return nil
}

func loadAll(pairs []string, leftOut string) ([]kernel.Run, error) {
	if len(pairs) == 0 {
		return nil, errors.New("no log given")
	}
	var out []kernel.Run
	for _, p := range pairs {
		name, path, ok := strings.Cut(p, "=")
		if !ok {
			return nil, fmt.Errorf("%q is not KERNEL=LOG", p)
		}
		r, err := load(name, path, leftOut)
		if err != nil {
			return nil, err
		}
		out = append(out, r)
	}
	return out, nil
}

func load(name, path, leftOut string) (kernel.Run, error) {
	f, err := os.Open(path)
	if err != nil {
		return kernel.Run{}, err
	}
	defer f.Close()
	r, err := kernel.Parse(name, f)
	if err != nil || leftOut == "" {
		return r, err
	}
	g, err := os.Open(leftOut)
	if err != nil {
		return r, err
	}
	defer g.Close()
	list, err := kernel.ParseLeftOut(g)
	if err != nil {
		return r, fmt.Errorf("%s: %w", leftOut, err)
	}
	r.LeaveOut(list)
	return r, nil
}
