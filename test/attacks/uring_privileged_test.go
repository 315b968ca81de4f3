// SPDX-License-Identifier: Apache-2.0

//go:build linux && privileged

package attacks

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/latchkey-dev/latchkey/test/testnode"
)

// Of linux/io_uring.h.
const (
	uringSetupSQPoll     = 1 << 1
	uringFeatNonFixed    = 1 << 7 // SQPOLL works on any descriptor (Linux 5.11)
	uringOpConnect       = 16
	uringSQEFixedFile    = 1 << 0
	uringEnterGetEvents  = 1 << 0
	uringEnterSQWakeup   = 1 << 1
	uringSQNeedWakeup    = 1 << 0
	uringOffCQRing       = 0x8000000
	uringOffSQEs         = 0x10000000
	uringRegisterFiles   = 2
	uringEntries         = 4
	uringParamsSize      = 120
	uringSubmissionBytes = 64
)

// uring is the least of an io_uring.
type uring struct {
	fd       int
	features uint32
	params   [uringParamsSize]byte
	sq, cq   []byte
	sqes     []byte
	extra    []byte // memory that the kernel reads while nobody holds it
}

func (u *uring) param(at int) uint32 { return binary.NativeEndian.Uint32(u.params[at:]) }

// word is a number that the kernel changes.
func word(b []byte, at uint32) *uint32 { return (*uint32)(unsafe.Pointer(&b[at])) }

func newUring(sqpoll bool) (*uring, error) {
	u := &uring{}
	if sqpoll {
		binary.NativeEndian.PutUint32(u.params[8:], uringSetupSQPoll)
		binary.NativeEndian.PutUint32(u.params[16:], 2000)
	}
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, uringEntries, uintptr(unsafe.Pointer(&u.params[0])), 0)
	if errno != 0 {
		return nil, os.NewSyscallError("io_uring_setup", errno)
	}
	u.fd = int(fd)
	u.features = u.param(20)
	for _, m := range []struct {
		to   *[]byte
		at   int64
		size int
	}{
		{&u.sq, 0, int(u.param(40+24)) + 4*int(u.param(0))},
		{&u.cq, uringOffCQRing, int(u.param(80+20)) + 16*int(u.param(4))},
		{&u.sqes, uringOffSQEs, uringSubmissionBytes * int(u.param(0))},
	} {
		b, err := unix.Mmap(u.fd, m.at, m.size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
		if err != nil {
			return nil, os.NewSyscallError("mmap", err)
		}
		*m.to = b
	}
	var err error
	u.extra, err = unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	return u, os.NewSyscallError("mmap", err)
}

func (u *uring) close() { unix.Close(u.fd) }

// connect submits IORING_OP_CONNECT to the agent and waits for its end.
func (u *uring) connect(fd int, sqpoll bool) error {
	sqe := u.sqes[:uringSubmissionBytes]
	sqe[0] = uringOpConnect
	if sqpoll && u.features&uringFeatNonFixed == 0 {
		binary.NativeEndian.PutUint32(u.extra[64:], uint32(fd))
		if _, _, errno := unix.Syscall6(unix.SYS_IO_URING_REGISTER, uintptr(u.fd), uringRegisterFiles, uintptr(unsafe.Pointer(&u.extra[64])), 1, 0, 0); errno != 0 {
			return os.NewSyscallError("io_uring_register", errno)
		}
		sqe[1], fd = uringSQEFixedFile, 0
	}
	binary.NativeEndian.PutUint32(sqe[4:], uint32(fd))
	sa := u.extra[:16]
	binary.NativeEndian.PutUint16(sa, unix.AF_INET)
	binary.BigEndian.PutUint16(sa[2:], agent4.Port())
	copy(sa[4:], agent4.Addr().AsSlice())
	binary.NativeEndian.PutUint64(sqe[8:], uint64(len(sa)))
	binary.NativeEndian.PutUint64(sqe[16:], uint64(uintptr(unsafe.Pointer(&sa[0]))))

	*word(u.sq, u.param(40+24)) = 0 // array[0]
	atomic.StoreUint32(word(u.sq, u.param(40+4)), 1)
	submit := uintptr(1)
	var flags uintptr
	if sqpoll {
		submit = 0
		if atomic.LoadUint32(word(u.sq, u.param(40+16)))&uringSQNeedWakeup != 0 {
			flags |= uringEnterSQWakeup
		}
	}
	if _, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(u.fd), submit, 0, flags, 0, 0); errno != 0 {
		return os.NewSyscallError("io_uring_enter", errno)
	}
	for deadline := time.Now().Add(patience); atomic.LoadUint32(word(u.cq, u.param(80+4))) == 0; {
		if time.Now().After(deadline) {
			return fmt.Errorf("the ring completes nothing: %w", unix.ETIMEDOUT)
		}
		time.Sleep(time.Millisecond)
		// Work that the kernel wants done by this task is done on the way out.
		if _, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(u.fd), 0, 0, uringEnterGetEvents, 0, 0); errno != 0 && errno != unix.EINTR {
			return os.NewSyscallError("io_uring_enter", errno)
		}
	}
	if res := int32(*word(u.cq, u.param(80+20)+8)); res < 0 {
		return syscall.Errno(-res)
	}
	return nil
}

type uringArgs struct {
	SQPoll bool
	Token  string
}

// uringAnswer is a catch, or why there is no io_uring for this process.
type uringAnswer struct {
	Missing string
	Catch   catch
}

// askByUring connects by io_uring and asks.
func askByUring(_ *testnode.Session, o uringArgs) (any, error) {
	u, err := newUring(o.SQPoll)
	if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
		return uringAnswer{Missing: err.Error()}, nil
	}
	if err != nil {
		return nil, err
	}
	defer u.close()
	fd, err := openSocket(askOptions{To: agent4})
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	if err := u.connect(fd, o.SQPoll); err != nil {
		return nil, err
	}
	got, err := askOver(fd, o.Token)
	c, _ := got.(catch)
	return uringAnswer{Catch: c}, err
}
