package dataplane

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const (
	// batchBytes is how large a write of requests is at most; the kernel takes up to some
	// 200 kB.
	batchBytes = 64 << 10
	// answerBytes is room for one answer of the kernel, which writes up to 32 kB at once.
	answerBytes = 64 << 10
	// answerRoom holds the refusals of a whole batch: each takes some 1 kB of it.
	answerRoom = 4 << 20
	// answerTimeout is more than the kernel ever needs.
	answerTimeout = 10 * time.Second
)

// rtnl is a socket for the links and neighbours of one namespace, or for its sockets. Requests are encoded one
// after the other and written together; only refusals are answered, and the last request of
// each write. One goroutine uses it at a time.
type rtnl struct {
	fd   int
	seq  uint32
	out  []byte
	from uint32 // number of the first request of out
	last int    // where the last one begins
	in   []byte
}

func openRTNL(ns netns.NsHandle) (*rtnl, error) { return openNetlink(ns, unix.NETLINK_ROUTE) }

// openNetlink opens a socket for one of the kernel's subjects.
func openNetlink(ns netns.NsHandle, subject int) (*rtnl, error) {
	r := &rtnl{fd: -1}
	err := within(ns, func() (err error) {
		r.fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, subject)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	timeout := unix.NsecToTimeval(answerTimeout.Nanoseconds())
	err = errors.Join(
		unix.Bind(r.fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}),
		unix.SetsockoptTimeval(r.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout),
		unix.SetsockoptInt(r.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, answerRoom),
		unix.SetsockoptInt(r.fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1),
	)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open netlink: %w", err), r.close())
	}
	return r, nil
}

func (r *rtnl) close() error { return unix.Close(r.fd) }

// request begins a request, whose body and attributes follow; end ends it.
func (r *rtnl) request(kind, flags uint16) {
	r.seq++
	if r.last = len(r.out); r.last == 0 {
		r.from = r.seq
	}
	r.out = append(r.out, make([]byte, unix.SizeofNlMsghdr)...)
	h := r.out[r.last:]
	binary.NativeEndian.PutUint16(h[4:], kind)
	binary.NativeEndian.PutUint16(h[6:], flags|unix.NLM_F_REQUEST)
	binary.NativeEndian.PutUint32(h[8:], r.seq)
}

func (r *rtnl) end() { binary.NativeEndian.PutUint32(r.out[r.last:], uint32(len(r.out)-r.last)) }

// attribute appends one attribute, padded to four bytes.
func (r *rtnl) attribute(kind uint16, value []byte) {
	r.out = binary.NativeEndian.AppendUint16(r.out, uint16(4+len(value)))
	r.out = binary.NativeEndian.AppendUint16(r.out, kind)
	r.out = append(r.out, value...)
	for len(r.out)%4 != 0 {
		r.out = append(r.out, 0)
	}
}

// address appends an address as an attribute.
func (r *rtnl) address(kind uint16, a netip.Addr) {
	if a.Is4() {
		b := a.As4()
		r.attribute(kind, b[:])
		return
	}
	b := a.As16()
	r.attribute(kind, b[:])
}

// full reports whether it is time to write.
func (r *rtnl) full() bool { return len(r.out) > batchBytes-256 }

// flush writes what was requested, and returns the refusals that ignore does not.
func (r *rtnl) flush(what string, ignore ...unix.Errno) error {
	if len(r.out) == 0 {
		return nil
	}
	// All requests are done when the write returns. The answer to the last one comes last.
	flags := r.out[r.last+6:]
	binary.NativeEndian.PutUint16(flags, binary.NativeEndian.Uint16(flags)|unix.NLM_F_ACK)
	if err := r.write(); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	var errs []error
	err := r.answers(func(kind, _ uint16, seq uint32, body []byte) (bool, error) {
		if kind != unix.NLMSG_ERROR || len(body) < 4 || int32(seq-r.from) < 0 { // or of a batch that was given up
			return false, nil
		}
		if code := unix.Errno(-int32(binary.NativeEndian.Uint32(body))); code != 0 && !slices.Contains(ignore, code) {
			errs = append(errs, fmt.Errorf("%s: %w", what, code))
		}
		return seq == r.seq, nil
	})
	return errors.Join(append(errs, err)...)
}

// dump writes a request for a list and gives each message of the answer to f, whose body is
// good until f returns. netlink.ErrDumpInterrupted says that the list changed meanwhile.
func (r *rtnl) dump(kind uint16, body []byte, f func(kind uint16, body []byte)) error {
	r.out = r.out[:0]
	r.request(kind, unix.NLM_F_DUMP)
	r.out = append(r.out, body...)
	r.end()
	if err := r.write(); err != nil {
		return err
	}
	interrupted := false
	err := r.answers(func(kind, flags uint16, seq uint32, body []byte) (bool, error) {
		if seq != r.seq {
			return false, nil // of a dump that was given up
		}
		interrupted = interrupted || flags&unix.NLM_F_DUMP_INTR != 0
		switch kind {
		case unix.NLMSG_DONE, unix.NLMSG_ERROR:
			if len(body) >= 4 {
				if code := unix.Errno(-int32(binary.NativeEndian.Uint32(body))); code != 0 {
					return true, code
				}
			}
			return true, nil
		default:
			f(kind, body)
			return false, nil
		}
	})
	if err == nil && interrupted {
		err = netlink.ErrDumpInterrupted
	}
	return err
}

// write writes out, which is empty then.
func (r *rtnl) write() error {
	err := unix.Sendto(r.fd, r.out, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	r.out = r.out[:0]
	if err != nil {
		return fmt.Errorf("write netlink: %w", err)
	}
	return nil
}

// answers reads messages until each says that it was the last.
func (r *rtnl) answers(each func(kind, flags uint16, seq uint32, body []byte) (last bool, err error)) error {
	if r.in == nil {
		r.in = make([]byte, answerBytes)
	}
	for {
		n, _, err := unix.Recvfrom(r.fd, r.in, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("read netlink: %w", err)
		}
		for data := r.in[:n]; len(data) >= unix.SizeofNlMsghdr; {
			size := int(binary.NativeEndian.Uint32(data))
			if size < unix.SizeofNlMsghdr || size > len(data) {
				break
			}
			kind, flags := binary.NativeEndian.Uint16(data[4:]), binary.NativeEndian.Uint16(data[6:])
			if last, err := each(kind, flags, binary.NativeEndian.Uint32(data[8:]), data[unix.SizeofNlMsghdr:size]); last || err != nil {
				return err
			}
			data = data[min(len(data), (size+3)&^3):]
		}
	}
}

// attributes calls f with each attribute of a message.
func attributes(data []byte, f func(kind uint16, value []byte)) {
	for len(data) >= 4 {
		size := int(binary.NativeEndian.Uint16(data))
		if size < 4 || size > len(data) {
			return
		}
		f(binary.NativeEndian.Uint16(data[2:])&nl.NLA_TYPE_MASK, data[4:size])
		data = data[min(len(data), (size+3)&^3):]
	}
}
