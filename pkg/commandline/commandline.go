// SPDX-License-Identifier: Apache-2.0

// Package commandline is what Latchkey's commands have in common: how they name
// their version and how they refuse a command line that makes no sense.
package commandline

import (
	"fmt"
	"io"
	"runtime/debug"

	"github.com/spf13/cobra"
)

// UsageError is a command line that cannot be understood. Commands exit with 2
// for it.
type UsageError struct{ Err error }

// Error is the cause's text.
func (e UsageError) Error() string { return e.Err.Error() }

// Unwrap gives the cause.
func (e UsageError) Unwrap() error { return e.Err }

// Root makes a command's root: it prints its help when it is given nothing to
// do, turns what it does not understand into a UsageError that says where to
// look, and has a version command. Errors are the caller's to print.
func Root(out io.Writer, use, short, long, version string) *cobra.Command {
	root := &cobra.Command{
		Use: use, Short: short, Long: long,
		Version: version, Args: NoArgs,
		SilenceUsage: true, SilenceErrors: true,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetOut(out)
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return UsageError{fmt.Errorf("%w; see %s --help", err, cmd.CommandPath())}
	})
	root.AddCommand(&cobra.Command{
		Use: "version", Short: "Print the version", Args: NoArgs,
		Run: func(*cobra.Command, []string) { fmt.Fprintln(out, version) },
	})
	return root
}

// NoArgs refuses arguments with a UsageError.
func NoArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return UsageError{fmt.Errorf("unknown argument %q; see %s --help", args[0], cmd.CommandPath())}
	}
	return nil
}

// Version is what the linker set, or else what the Go toolchain recorded.
func Version(linked string) string {
	if linked != "" {
		return linked
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		return info.Main.Version
	}
	return "unknown"
}
