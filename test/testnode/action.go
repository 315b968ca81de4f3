// SPDX-License-Identifier: Apache-2.0

//go:build linux

package testnode

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"runtime"
	"runtime/debug"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	// actionEnv is set for a program that is executed again, and names its
	// role.
	actionEnv = "LATCHKEY_TESTNODE_ACTION"
	// argsEnv carries the role's arguments, as JSON.
	argsEnv = "LATCHKEY_TESTNODE_ARGS"

	roleProc     = "proc"
	roleWatchdog = "watchdog"

	// controlFD is the descriptor of the socket to the test in a proc.
	controlFD = 3

	// Bounds of one message, against a program that writes rubbish to the
	// control socket.
	maxMessage = 16 << 20
	maxFiles   = 64
)

// Action is code that a test runs in a pod. args are what the caller gave, as
// JSON; the result is encoded as JSON in turn. An error reaches the caller as
// an [ActionError].
type Action func(s *Session, args json.RawMessage) (any, error)

// Actions are actions by name. Names that begin with "testnode." are the
// package's own.
type Actions map[string]Action

// Session is what an action's process keeps between calls.
type Session struct {
	// Values is for the actions' own state, such as open connections.
	Values map[string]any

	received []*os.File
	reply    []*os.File
}

// Files are the descriptors that came with this call, see [Proc.CallFiles].
// The action owns them.
func (s *Session) Files() []*os.File { return s.received }

// Reply sends descriptors to the caller along with the result. They are closed
// in this process once sent.
func (s *Session) Reply(files ...*os.File) { s.reply = append(s.reply, files...) }

// ActionError is an error of an action, brought over from its process.
type ActionError struct {
	// Action is its name.
	Action string
	// Message is the error's text.
	Message string
	// Errno is the system's error number in it, 0 if there is none;
	// errors.Is(err, syscall.ECONNREFUSED) works.
	Errno syscall.Errno
	// Timeout says that it was a network time-out.
	Timeout bool
}

// Error implements error.
func (e *ActionError) Error() string { return fmt.Sprintf("action %s: %s", e.Action, e.Message) }

// Unwrap gives the system's error number to errors.Is.
func (e *ActionError) Unwrap() error {
	if e.Errno == 0 {
		return nil
	}
	return e.Errno
}

// command is a call on its way to an action's process.
type command struct {
	Action string
	Args   json.RawMessage
}

// answer is what comes back.
type answer struct {
	Result json.RawMessage `json:",omitempty"`
	Error  *ActionError    `json:",omitempty"`
}

// Main makes the program able to be its own pods' processes. It must be the
// first call of main or TestMain: if the program was started by this package
// in one of its roles, Main carries it out and exits; otherwise it returns at
// once. The actions are those that [Place.Call] and [Proc.Call] can name.
func Main(actions ...Actions) {
	role, ok := os.LookupEnv(actionEnv)
	if !ok {
		return
	}
	args := os.Getenv(argsEnv)
	// Programs that this one starts in turn are not in the role.
	os.Unsetenv(actionEnv)
	os.Unsetenv(argsEnv)
	var err error
	switch role {
	case roleProc:
		all := builtinActions()
		for _, a := range actions {
			maps.Copy(all, a)
		}
		err = serveActions(all)
	case roleWatchdog:
		err = watch(args)
	default:
		err = fmt.Errorf("unknown role %q", role)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "testnode:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// serveActions runs what comes over the control socket until the test closes
// it or dies.
func serveActions(actions Actions) error {
	file := os.NewFile(controlFD, "control")
	conn, err := net.FileConn(file)
	if err != nil {
		return fmt.Errorf("opening the control socket: %w", err)
	}
	file.Close()
	control, ok := conn.(*net.UnixConn)
	if !ok {
		return fmt.Errorf("the control socket is a %T", conn)
	}
	session := &Session{Values: make(map[string]any)}
	for {
		var cmd command
		session.received, err = receive(control, &cmd)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		session.reply = nil
		reply := run(actions, session, cmd)
		err := send(control, reply, session.reply)
		for _, f := range session.reply {
			f.Close()
		}
		if err != nil {
			return err
		}
	}
}

// run carries out one call; a panic is that call's error.
func run(actions Actions, session *Session, cmd command) (reply answer) {
	fail := func(err error) answer {
		ae := &ActionError{Action: cmd.Action, Message: err.Error()}
		errors.As(err, &ae.Errno)
		var timeout interface{ Timeout() bool }
		ae.Timeout = errors.As(err, &timeout) && timeout.Timeout()
		return answer{Error: ae}
	}
	defer func() {
		if p := recover(); p != nil {
			reply = fail(fmt.Errorf("panic: %v\n%s", p, debug.Stack()))
		}
	}()
	action, ok := actions[cmd.Action]
	if !ok {
		return fail(errors.New("no such action: it must be given to testnode.Main"))
	}
	result, err := action(session, cmd.Args)
	if err != nil {
		return fail(err)
	}
	if reply.Result, err = json.Marshal(result); err != nil {
		return fail(fmt.Errorf("encoding the result: %w", err))
	}
	return reply
}

// send writes one message: its length and the number of descriptors, 4 bytes
// each, then JSON. The descriptors travel with the first byte.
func send(conn *net.UnixConn, message any, files []*os.File) error {
	text, err := json.Marshal(message)
	if err != nil {
		return fmt.Errorf("encoding a message: %w", err)
	}
	if len(text) > maxMessage || len(files) > maxFiles {
		return fmt.Errorf("a message of %d bytes with %d descriptors is too large", len(text), len(files))
	}
	var rights []byte
	if len(files) > 0 {
		fds := make([]int, 0, len(files))
		for _, f := range files {
			fd, err := descriptor(f)
			if err != nil {
				return fmt.Errorf("passing a descriptor: %w", err)
			}
			fds = append(fds, fd)
		}
		rights = unix.UnixRights(fds...)
	}
	defer runtime.KeepAlive(files)
	header := binary.BigEndian.AppendUint32(nil, uint32(len(text)))
	header = binary.BigEndian.AppendUint32(header, uint32(len(files)))
	n, _, err := conn.WriteMsgUnix(header, rights, nil)
	if err != nil {
		return fmt.Errorf("sending a message: %w", err)
	}
	if _, err := conn.Write(append(header[n:], text...)); err != nil {
		return fmt.Errorf("sending a message: %w", err)
	}
	return nil
}

// descriptor is File.Fd without its side effect of making the open file
// blocking, which every copy of the descriptor shares.
func descriptor(f *os.File) (int, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return -1, err
	}
	var fd int
	err = raw.Control(func(n uintptr) { fd = int(n) })
	return fd, err
}

// receive reads one message. At the end of the stream its error is io.EOF.
func receive(conn *net.UnixConn, message any) ([]*os.File, error) {
	header := make([]byte, 8)
	rights := make([]byte, unix.CmsgSpace(maxFiles*4))
	n, oobn, _, _, err := conn.ReadMsgUnix(header, rights)
	if errors.Is(err, io.EOF) || err == nil && n == 0 {
		return nil, io.EOF
	}
	if err != nil {
		return nil, fmt.Errorf("receiving a message: %w", err)
	}
	files, err := parseRights(rights[:oobn])
	if err != nil {
		return nil, err
	}
	err = func() error {
		if _, err := io.ReadFull(conn, header[n:]); err != nil {
			return fmt.Errorf("receiving a message: %w", err)
		}
		size, count := binary.BigEndian.Uint32(header), binary.BigEndian.Uint32(header[4:])
		if size > maxMessage || int64(count) != int64(len(files)) {
			return fmt.Errorf("malformed message: %d bytes, %d descriptors announced, %d came", size, count, len(files))
		}
		text := make([]byte, size)
		if _, err := io.ReadFull(conn, text); err != nil {
			return fmt.Errorf("receiving a message: %w", err)
		}
		if err := json.Unmarshal(text, message); err != nil {
			return fmt.Errorf("decoding a message: %w", err)
		}
		return nil
	}()
	if err != nil {
		closeAll(files)
		return nil, err
	}
	return files, nil
}

func parseRights(oob []byte) ([]*os.File, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("parsing a control message: %w", err)
	}
	var files []*os.File
	for i := range messages {
		fds, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			closeAll(files)
			return nil, fmt.Errorf("parsing passed descriptors: %w", err)
		}
		for _, fd := range fds {
			// The net package receives with MSG_CMSG_CLOEXEC.
			files = append(files, os.NewFile(uintptr(fd), "passed"))
		}
	}
	return files, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
