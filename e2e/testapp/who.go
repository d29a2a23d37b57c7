package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"syscall"
	"time"
)

// whois answers, at some ports, each line of a connection and each datagram with its host
// name and the address that it came from, and prints that.
func whois(ctx context.Context, addrs []string) error {
	failed := make(chan error, len(addrs))
	for _, addr := range addrs {
		go func() { failed <- whoisAt(ctx, addr) }()
	}
	for range addrs {
		if err := <-failed; err != nil {
			return err
		}
	}
	return nil
}

func whoisAt(ctx context.Context, addr string) error {
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	p, err := net.ListenPacket("udp", addr)
	if err != nil {
		return err
	}
	go func() {
		<-ctx.Done()
		_, _ = l.Close(), p.Close()
	}()
	go func() {
		buf := make([]byte, 2048)
		for {
			_, from, err := p.ReadFrom(buf)
			if err != nil {
				return
			}
			fmt.Println("udp", from)
			_, _ = p.WriteTo(fmt.Appendf(nil, "%s %s\n", host, from), from)
		}
	}()
	for {
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return err
		}
		fmt.Println("tcp", c.RemoteAddr())
		go func() {
			defer c.Close()
			for lines := bufio.NewScanner(c); lines.Scan(); {
				if _, err := fmt.Fprintf(c, "%s %s\n", host, c.RemoteAddr()); err != nil {
					return
				}
			}
		}()
	}
}

// who connects from one port to several servers, then asks all of them some times in turn
// and prints who answered and whom they saw. A port of zero takes another one for each.
func who(network, port string, servers []string) error {
	from, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return err
	}
	d := net.Dialer{Timeout: 5 * time.Second, Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		return errors.Join(c.Control(func(fd uintptr) { err = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1) }), err)
	}}
	open := make([]net.Conn, 0, len(servers))
	for _, to := range servers {
		addr, err := netip.ParseAddrPort(to)
		if err != nil {
			return err
		}
		d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(unspecified(addr.Addr()), uint16(from)))
		if network == "udp" {
			d.LocalAddr = net.UDPAddrFromAddrPort(netip.AddrPortFrom(unspecified(addr.Addr()), uint16(from)))
		}
		c, err := d.Dial(network, to)
		if err != nil {
			return err
		}
		defer c.Close()
		open = append(open, c)
	}
	for range 5 {
		for i, c := range open {
			if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
				return err
			}
			if _, err := c.Write([]byte("who\n")); err != nil {
				return err
			}
			buf := make([]byte, 256)
			n, err := c.Read(buf)
			if err != nil {
				return fmt.Errorf("%s: %w", servers[i], err)
			}
			fmt.Print(string(buf[:n]))
		}
	}
	return nil
}

func unspecified(like netip.Addr) netip.Addr {
	if like.Is4() {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}
