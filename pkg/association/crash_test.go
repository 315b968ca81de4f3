// SPDX-License-Identifier: Apache-2.0

package association

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/etcd"
)

// The crash test runs this test binary again as a program that writes, kills it
// with SIGKILL, and compares what is there with what was acknowledged. It shows
// that no process crash loses an acknowledged write; that no power failure does
// is up to fsync, which etcd calls before it acknowledges, and to the disk.
const (
	crashDirEnv = "LATCHKEY_CRASH_DIR"
	// crashesEnv sets how often; 200 before a release.
	crashesEnv     = "LATCHKEY_CRASHES"
	defaultCrashes = 15
	crashWorkers   = 8
	crashSubjects  = 12
	crashRunEnv    = "LATCHKEY_CRASH_RUN"
)

// crashOp is one line of what the program says before and after each write: an
// operation's number, and what it writes. Each worker has service accounts of
// its own, so that what they go through is a sequence.
//
//	begin WORKER SEQ create|update|delete SUBJECT ID|- ROLE TOKEN
//	ack   WORKER SEQ ID
type crashOp struct {
	kind, subject, id, role, token string
	acked                          bool
	gotID                          string
}

func crashSubject(worker, i int) string { return fmt.Sprintf("w%d-sa%d", worker, i) }

// crashChild writes until it is killed.
func crashChild(dir string) {
	run := os.Getenv(crashRunEnv)
	fail := func(err error) {
		fmt.Println("fail", err)
		os.Exit(1)
	}
	ctx := context.Background()
	srv, err := etcd.Start(ctx, etcd.Config{Dir: dir})
	if err != nil {
		fail(err)
	}
	s := NewStore(Config{Client: srv.Client(), Timeout: time.Minute, Limit: crashWorkers * crashSubjects})
	if _, err := s.PutCluster(ctx, testCluster("prod")); err != nil {
		fail(err)
	}
	have := map[string]Association{}
	in := ListInput{Cluster: "prod"}
	for {
		p, err := s.List(ctx, in)
		if err != nil {
			fail(err)
		}
		for _, a := range p.Associations {
			have[a.ServiceAccount] = a
		}
		if in.NextToken = p.NextToken; in.NextToken == "" {
			break
		}
	}
	// One write for each line, so that lines of several workers do not mix.
	say := func(format string, args ...any) { _, _ = os.Stdout.WriteString(fmt.Sprintf(format+"\n", args...)) }
	errs := make(chan error)
	for w := range crashWorkers {
		mine := map[string]Association{}
		for i := range crashSubjects {
			if a, ok := have[crashSubject(w, i)]; ok {
				mine[a.ServiceAccount] = a
			}
		}
		go func() {
			for seq := 0; ; seq++ {
				sa := crashSubject(w, rand.IntN(crashSubjects))
				a, there := mine[sa]
				role := fmt.Sprintf("%s-%s-%d-%d", role, run, w, seq)
				token := fmt.Sprintf("%s-%d-%d", run, w, seq)
				var err error
				switch {
				case !there:
					say("begin %d %d create %s - %s %s", w, seq, sa, role, token)
					a, err = s.Create(ctx, CreateInput{Cluster: "prod", Namespace: "ns", ServiceAccount: sa, RoleARN: role, ClientToken: token})
					mine[sa] = a
				case rand.IntN(3) == 0:
					say("begin %d %d delete %s %s - -", w, seq, sa, a.ID)
					_, err = s.Delete(ctx, DeleteInput{Cluster: "prod", ID: a.ID})
					delete(mine, sa)
				default:
					say("begin %d %d update %s %s %s %s", w, seq, sa, a.ID, role, token)
					_, err = s.Update(ctx, UpdateInput{Cluster: "prod", ID: a.ID, RoleARN: &role, ClientToken: token})
				}
				if err != nil {
					errs <- err
					return
				}
				say("ack %d %d %s", w, seq, a.ID)
			}
		}()
	}
	fail(<-errs)
}

func TestCrash(t *testing.T) {
	crashes := defaultCrashes
	if v := os.Getenv(crashesEnv); v != "" {
		n, err := strconv.Atoi(v)
		if err != nil || n < 1 {
			t.Fatalf("%s=%s", crashesEnv, v)
		}
		crashes = n
	} else if testing.Short() {
		crashes = 2
	}
	dir := t.TempDir()
	// What every service account has, by all that was acknowledged.
	model := map[string]crashState{}
	total, open := 0, 0
	for run := range crashes {
		ops := crashRun(t, dir, run)
		acked, unknown := crashVerify(t, dir, ops, model)
		total, open = total+acked, open+unknown
		if t.Failed() {
			t.Fatalf("after crash %d", run)
		}
	}
	t.Logf("%d crashes, %d acknowledged writes, %d writes under way when it happened, %d associations left", crashes, total, open, len(model))
	if total == 0 {
		t.Error("nothing was ever acknowledged: nothing was shown")
	}
}

type crashState struct{ id, role string }

// crashRun starts the program, kills it after some writes, and returns what each
// worker did.
func crashRun(t *testing.T, dir string, run int) map[string][]*crashOp {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), crashDirEnv+"="+dir, crashRunEnv+"="+strconv.Itoa(run))
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	// It dies at a random number of lines, and a random moment after: now and then
	// while it starts or before its first write. However slow the machine is, it
	// dies in the end.
	lines := rand.IntN(400)
	if run%5 == 0 {
		lines = 0
	}
	ops := map[string][]*crashOp{}
	killed := make(chan struct{})
	kill := func() {
		defer close(killed)
		time.Sleep(time.Duration(rand.IntN(20)) * time.Millisecond)
		_ = cmd.Process.Kill()
	}
	if lines == 0 {
		time.Sleep(time.Duration(rand.IntN(300)) * time.Millisecond)
		go kill()
	}
	r := bufio.NewReader(out)
	for n := 0; ; n++ {
		line, err := r.ReadString('\n')
		if err != nil { // a last line may be cut off: then it was not said
			if !errors.Is(err, io.EOF) && !errors.Is(err, os.ErrClosed) {
				t.Errorf("read what the program says: %v", err)
			}
			break
		}
		if lines > 0 && n == lines {
			go kill()
		}
		f := strings.Fields(line)
		switch {
		case f[0] == "begin" && len(f) == 8:
			ops[f[1]] = append(ops[f[1]], &crashOp{kind: f[3], subject: f[4], id: f[5], role: f[6], token: f[7]})
		case f[0] == "ack" && len(f) == 4:
			of := ops[f[1]]
			of[len(of)-1].acked, of[len(of)-1].gotID = true, f[3]
		default:
			t.Errorf("the program says: %s", line)
		}
	}
	<-killed
	if err := cmd.Wait(); err == nil {
		t.Error("the program ended by itself")
	}
	return ops
}

// crashVerify opens what the crash left, and compares.
func crashVerify(t *testing.T, dir string, ops map[string][]*crashOp, model map[string]crashState) (acked, unknown int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	srv, err := etcd.Start(ctx, etcd.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := srv.Close(); err != nil {
			t.Error(err)
		}
	}()
	s := NewStore(Config{Client: srv.Client(), Timeout: patience, Limit: crashWorkers * crashSubjects})
	stored := map[string]crashState{}
	for at, a := range consistent(t, s) {
		stored[at.serviceAccount] = crashState{a.ID, a.RoleARN}
	}
	for _, list := range ops {
		for i, op := range list {
			before, had := model[op.subject]
			after := crashState{op.gotID, op.role}
			if op.acked {
				acked++
				if op.kind == "delete" {
					delete(model, op.subject)
				} else {
					model[op.subject] = after
				}
				continue
			}
			unknown++
			if i != len(list)-1 {
				t.Fatalf("a worker went on without an answer: %+v", op)
			}
			// It happened, or it did not; nothing else.
			now, has := stored[op.subject]
			happened := false
			switch op.kind {
			case "create":
				happened = has
				if has && now.role != op.role {
					t.Errorf("%+v left %+v", op, now)
				}
				// The retry that a client makes after the crash gives the one association.
				a, err := s.Create(ctx, CreateInput{Cluster: "prod", Namespace: "ns", ServiceAccount: op.subject, RoleARN: op.role, ClientToken: op.token})
				if err != nil || has && a.ID != now.id || a.RoleARN != op.role {
					t.Errorf("retry of %+v: %+v, %v; it left %+v", op, a, err, now)
				}
				stored[op.subject] = crashState{a.ID, a.RoleARN}
				model[op.subject] = stored[op.subject]
				continue
			case "update":
				after.id = op.id
				happened = has && now == after
			case "delete":
				happened = !has
			}
			switch {
			case happened && op.kind == "delete":
				delete(model, op.subject)
			case happened:
				model[op.subject] = after
			case !had || now != before:
				t.Errorf("%+v on %+v left %+v", op, before, now)
			}
		}
	}
	for sa, want := range model {
		if got := stored[sa]; got != want {
			t.Errorf("%s: acknowledged %+v, there is %+v", sa, want, got)
		}
	}
	for sa, got := range stored {
		if _, ok := model[sa]; !ok {
			t.Errorf("%s: %+v was never made, or was deleted", sa, got)
		}
	}
	// An index that starts now has the same.
	x := NewIndex(IndexConfig{Client: srv.Client()})
	if err := x.list(ctx); err != nil {
		t.Fatal(err)
	}
	sameAsStore(t, x, s)
	return acked, unknown
}
