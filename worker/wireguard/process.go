package wireguard

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"

	"github.com/skep-dev/skep/platform/process"
)

const (
	// Link is the name of the device in its namespace.
	Link = "wg0"
	// socketCheck is how often a process looks whether its socket is still there.
	socketCheck = 2 * time.Second
	// callTimeout bounds one exchange with a process.
	callTimeout = 10 * time.Second
	// startTimeout bounds the start of a process on a loaded machine.
	startTimeout = 20 * time.Second
)

// Serving says where the process of a userspace device works.
type Serving struct {
	// Namespace is the path of the network namespace of the link.
	Namespace string
	// Socket is where it is programmed.
	Socket string
	// MTU is the link's.
	MTU int
}

// args are the arguments from which ServeArgs makes a Serving again.
func (s Serving) args() []string { return []string{s.Namespace, s.Socket, strconv.Itoa(s.MTU)} }

// ServeArgs is Serve with the arguments that Start gives to the program.
func ServeArgs(ctx context.Context, args []string) error {
	if len(args) != 3 {
		return errors.New("wants NAMESPACE SOCKET MTU")
	}
	mtu, err := strconv.Atoi(args[2])
	if err != nil {
		return fmt.Errorf("MTU: %w", err)
	}
	return Serve(ctx, Serving{Namespace: args[0], Socket: args[1], MTU: mtu})
}

// Serve runs a userspace device with its UDP socket in the calling process's network
// namespace until ctx ends, the link is removed, or the socket is: who removes the files
// of a node ends its devices with them.
func Serve(ctx context.Context, s Serving) error {
	link, err := makeLink(s)
	if err != nil {
		return err
	}
	d := device.NewDevice(link, conn.NewDefaultBind(), &device.Logger{Verbosef: device.DiscardLogf, Errorf: complaints(os.Stderr, logged)})
	defer d.Close()
	listen, err := listenAt(s.Socket)
	if err != nil {
		return err
	}
	defer listen.Close() //nolint:errcheck // the process ends
	go func() {
		for {
			c, err := listen.Accept()
			if err != nil {
				return
			}
			go d.IpcHandle(c)
		}
	}()
	var own unix.Stat_t
	if err := unix.Stat(s.Socket, &own); err != nil {
		return fmt.Errorf("listen on %s: %w", s.Socket, err)
	}
	tick := time.NewTicker(socketCheck)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-d.Wait():
			return errors.New("the link is gone")
		case <-tick.C:
			var now unix.Stat_t
			if err := unix.Stat(s.Socket, &now); err != nil || now.Ino != own.Ino {
				return nil
			}
		}
	}
}

// logged bounds the lines that a device may write: whoever cannot reach another would go on
// for ever, and nobody turns its log over.
const logged = 1000

// complaints returns a function that writes lines, the first so many.
func complaints(w io.Writer, left int64) func(format string, args ...any) {
	var count atomic.Int64
	return func(format string, args ...any) {
		if n := count.Add(1); n <= left {
			fmt.Fprintf(w, time.Now().UTC().Format(time.RFC3339)+" "+format+"\n", args...) //nolint:errcheck // there is nobody to tell
		}
	}
}

// makeLink makes the TUN link in its namespace. The thread returns to its own: by the main
// thread's others see where the process belongs.
func makeLink(s Serving) (link tun.Device, err error) {
	runtime.LockOSThread()
	own, err := netns.Get()
	if err != nil {
		return nil, fmt.Errorf("make link: %w", err)
	}
	defer own.Close() //nolint:errcheck // a read-only descriptor
	ns, err := netns.GetFromPath(s.Namespace)
	if err != nil {
		return nil, fmt.Errorf("make link in %s: %w", s.Namespace, err)
	}
	defer ns.Close() //nolint:errcheck // a read-only descriptor
	if err := netns.Set(ns); err != nil {
		return nil, fmt.Errorf("make link in %s: %w", s.Namespace, err)
	}
	if link, err = tun.CreateTUN(Link, s.MTU); err == nil {
		link, err = stay(link)
	}
	if back := netns.Set(own); back != nil {
		return nil, fmt.Errorf("leave %s: %w", s.Namespace, errors.Join(err, back))
	}
	runtime.UnlockOSThread()
	if err != nil {
		return nil, fmt.Errorf("make link in %s: %w", s.Namespace, err)
	}
	return link, nil
}

// distant is a link in another namespace than its process's.
type distant struct {
	tun.Device

	h *netlink.Handle
}

// stay makes a distant of a link of the thread's namespace.
func stay(link tun.Device) (tun.Device, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, errors.Join(err, link.Close())
	}
	return &distant{link, h}, nil
}

// MTU looks where the link is. The device itself looks for it where the process is, finds
// none, takes another for granted, and makes full packets too large.
func (d *distant) MTU() (int, error) {
	link, err := d.h.LinkByName(Link)
	if err != nil {
		return 0, fmt.Errorf("find link: %w", err)
	}
	return link.Attrs().MTU, nil
}

// Names of sockets may be longer than the kernel takes, so they are reached through their
// directory.
func throughDir(socket string, f func(short string) error) error {
	dir, err := os.Open(filepath.Dir(socket))
	if err != nil {
		return err
	}
	defer dir.Close() //nolint:errcheck // only held open
	return f(fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), filepath.Base(socket)))
}

func listenAt(socket string) (*net.UnixListener, error) {
	var l *net.UnixListener
	err := throughDir(socket, func(short string) (err error) {
		// Made under another name: who finds the socket can connect to it.
		fresh := short + "+"
		_ = os.Remove(fresh)
		if l, err = net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: fresh}); err != nil {
			return err
		}
		l.SetUnlinkOnClose(false)
		return errors.Join(os.Chmod(fresh, 0o600), os.Rename(fresh, short))
	})
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", socket, err)
	}
	return l, nil
}

// Process is a userspace device.
type Process struct{ socket string }

// Find returns the device that is programmed at socket, if one runs.
func Find(socket string) (*Process, bool) {
	p := &Process{socket}
	c, err := p.dial()
	if err != nil {
		return nil, false
	}
	_ = c.Close()
	return p, true
}

// Start starts program with the arguments before those for ServeArgs, in the network
// namespace of its UDP socket, and returns when it can be programmed. Its output goes to
// the file log.
func Start(ctx context.Context, program []string, host netns.NsHandle, s Serving, log string) (*Process, error) {
	started, err := process.Start(process.Command{
		Path: program[0], Args: append(program[1:len(program):len(program)], s.args()...), Dir: "/", Log: log,
		Enter: func() error { return netns.Set(host) },
	})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		if p, ok := Find(s.Socket); ok {
			return p, nil
		}
		if !started.Alive() {
			return nil, fmt.Errorf("start userspace WireGuard: it ended: %s", strings.TrimSpace(process.Tail(log, 300)))
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("start userspace WireGuard: %w", ctx.Err()), started.Signal(unix.SIGKILL))
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func (p *Process) dial() (*net.UnixConn, error) {
	var c *net.UnixConn
	err := throughDir(p.socket, func(short string) (err error) {
		c, err = net.DialUnix("unix", nil, &net.UnixAddr{Net: "unix", Name: short})
		return err
	})
	return c, err
}

// Watch calls ended once, on a goroutine, when the device's process ends or the returned
// function is called.
func (p *Process) Watch(ended func()) (stop func(), err error) {
	c, err := p.dial()
	if err != nil {
		return nil, fmt.Errorf("reach userspace WireGuard: %w", err)
	}
	go func() {
		_, _ = io.Copy(io.Discard, c) // it says nothing unasked; only the end matters
		_ = c.Close()
		ended()
	}()
	return func() { _ = c.Close() }, nil
}

// exchange sends a request and hands the answer to read.
func (p *Process) exchange(request string, read func(io.Reader) error) error {
	c, err := p.dial()
	if err != nil {
		return fmt.Errorf("reach userspace WireGuard: %w", err)
	}
	defer c.Close() //nolint:errcheck // one exchange a connection
	if err := c.SetDeadline(time.Now().Add(callTimeout)); err != nil {
		return err
	}
	if _, err := io.WriteString(c, request); err != nil {
		return fmt.Errorf("program userspace WireGuard: %w", err)
	}
	return read(c)
}

// Read returns what the device has.
func (p *Process) Read() (c Config, err error) {
	err = p.exchange("get=1\n\n", func(r io.Reader) (err error) { c, err = parse(r); return err })
	return c, err
}

// Write makes changes.
func (p *Process) Write(c Changes) error {
	return p.exchange(encode(c), func(r io.Reader) error {
		line, err := bufio.NewReader(r).ReadString('\n')
		if err != nil {
			return fmt.Errorf("program userspace WireGuard: %w", err)
		}
		if value := strings.TrimSuffix(strings.TrimPrefix(line, "errno="), "\n"); value != "0" {
			return fmt.Errorf("program userspace WireGuard: %w", errno(value))
		}
		return nil
	})
}

// Close ends the device and waits until it is gone.
func (p *Process) Close(ctx context.Context) error {
	c, err := p.dial()
	if err != nil {
		return errors.Join(removed(p.socket)) // it has ended
	}
	pid, err := peer(c)
	_ = c.Close()
	if err != nil {
		return fmt.Errorf("end userspace WireGuard: %w", err)
	}
	running, err := process.Find(pid)
	if err == nil {
		err = running.Stop(ctx, 5*time.Second)
	} else if errors.Is(err, process.ErrNotRunning) {
		err = nil
	}
	return errors.Join(err, removed(p.socket))
}

func removed(socket string) error {
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// peer returns the process that listens at the other end.
func peer(c *net.UnixConn) (int, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var failed error
	if err := raw.Control(func(fd uintptr) {
		cred, failed = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, err
	}
	if failed != nil {
		return 0, failed
	}
	return int(cred.Pid), nil
}
