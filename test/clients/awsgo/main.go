// SPDX-License-Identifier: Apache-2.0

// awsgo gets credentials with an unmodified aws-sdk-go-v2, by its default
// chain, and prints what it got as JSON: never a secret. Its exit status is 0
// if it got credentials, 1 if not, 2 if it was used wrongly.
//
// With -hold it keeps one connection open and makes a request for each line
// "get" or "get TOKENFILE" on its standard input.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/latchkey-dev/latchkey/test/clients"
)

func main() { os.Exit(run()) }

func run() int {
	hold := flag.Bool("hold", false, "keep one connection and make a request for each line `get [TOKENFILE]` on standard input")
	timeout := flag.Duration("timeout", time.Minute, "give up after this long, the SDK's retries included (not with -hold)")
	flag.Parse()
	if flag.NArg() > 0 {
		fmt.Fprintln(os.Stderr, "awsgo: takes no arguments")
		return 2
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if *hold {
		if err := clients.Hold(ctx, os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, "awsgo:", err)
			return 2
		}
		return 0
	}
	ctx, cancel := context.WithTimeout(ctx, *timeout)
	defer cancel()
	result := clients.Fetch(ctx)
	if err := json.NewEncoder(os.Stdout).Encode(result); err != nil {
		fmt.Fprintln(os.Stderr, "awsgo:", err)
		return 2
	}
	if result.Error != "" {
		return 1
	}
	return 0
}
