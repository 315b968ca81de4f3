// SPDX-License-Identifier: Apache-2.0

// Command client is what runs in the suites' pods. What it prints is JSON and
// holds nothing that could be used: no secret, no token.
//
//	client hold                wait for a signal
//	client fetch               credentials by the default chain of aws-sdk-go-v2
//	client get [FILE|-]        one request with the token of the pod, of FILE, or
//	                           of standard input; not retried
//	client must                the same with the pod's token: exits with 1 unless
//	                           the first answer is credentials
//	client connection          keep one connection; a request for each line "get"
//	client ask INTERVAL FILE   a request every so often, each on a new connection,
//	                           its outcome a line in FILE
//
// fetch exits with 1 if it got no credentials, get if it got no response.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/latchkey-dev/latchkey/test/clients"
)

func main() { os.Exit(run()) }

func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	verb, args := "", os.Args[1:]
	if len(args) > 0 {
		verb, args = args[0], args[1:]
	}
	var err error
	switch {
	case verb == "hold" && len(args) == 0:
		<-ctx.Done()
	case verb == "fetch" && len(args) == 0:
		err = fetch(ctx)
	case verb == "get" && len(args) <= 1:
		_, err = get(ctx, os.Stdout, args)
	case verb == "must" && len(args) == 0:
		err = must(ctx)
	case verb == "connection" && len(args) == 0:
		err = clients.Hold(ctx, os.Stdin, os.Stdout)
	case verb == "ask" && len(args) == 2:
		err = ask(ctx, args[0], args[1])
	default:
		fmt.Fprintln(os.Stderr, "usage: client hold | fetch | get [FILE|-] | must | connection | ask INTERVAL FILE")
		return 2
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "client:", err)
		return 1
	}
	return 0
}

func fetch(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	result := clients.Fetch(ctx)
	if err := json.NewEncoder(os.Stdout).Encode(result); err != nil {
		return err
	}
	if result.Error != "" {
		return errors.New("no credentials")
	}
	return nil
}

// get makes one request with a connection of its own, and prints the outcome.
func get(ctx context.Context, out io.Writer, args []string) (clients.HoldResult, error) {
	var result clients.HoldResult
	command := "get"
	if len(args) == 1 {
		file := args[0]
		if file == "-" {
			var err error
			if file, err = save(os.Stdin); err != nil {
				return result, fmt.Errorf("keeping the token: %w", err)
			}
			defer os.Remove(file)
		}
		command += " " + file
	}
	var line bytes.Buffer
	if err := clients.Hold(ctx, strings.NewReader(command), &line); err != nil {
		return result, err
	}
	if err := json.Unmarshal(line.Bytes(), &result); err != nil {
		return result, err
	}
	if _, err := out.Write(line.Bytes()); err != nil {
		return result, err
	}
	if result.Status == 0 {
		return result, errors.New("no response")
	}
	return result, nil
}

// save keeps a token in a file of its own and says where.
func save(in io.Reader) (name string, err error) {
	token, err := io.ReadAll(io.LimitReader(in, 64<<10))
	if err != nil {
		return "", err
	}
	f, err := os.CreateTemp("", "token")
	if err != nil {
		return "", err
	}
	_, err = f.WriteString(strings.TrimSpace(string(token)))
	return f.Name(), errors.Join(err, f.Close())
}

func must(ctx context.Context) error {
	result, err := get(ctx, os.Stdout, nil)
	if err == nil && result.Status != http.StatusOK {
		err = fmt.Errorf("status %d", result.Status)
	}
	return err
}

// ask goes on until a signal, whatever it is answered.
func ask(ctx context.Context, interval, file string) error {
	every, err := time.ParseDuration(interval)
	if err != nil {
		return fmt.Errorf("the interval: %w", err)
	}
	if every <= 0 {
		return fmt.Errorf("the interval %s is not above zero", every)
	}
	out, err := os.Create(file)
	if err != nil {
		return err
	}
	defer out.Close()
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	for {
		// The outcome is in the file.
		_, _ = get(ctx, out, nil)
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}
