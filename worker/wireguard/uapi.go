package wireguard

import (
	"bufio"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// The text by which userspace devices are programmed, which all implementations of
// WireGuard share: https://www.wireguard.com/xplatform/.

// encode returns the request for some changes.
func encode(c Changes) string {
	var b strings.Builder
	line := func(key, value string) { b.WriteString(key + "=" + value + "\n") }
	line("set", "1")
	if !c.Private.IsZero() {
		line("private_key", hex.EncodeToString(c.Private[:]))
	}
	if c.Port != 0 {
		line("listen_port", strconv.Itoa(int(c.Port)))
	}
	for _, k := range c.Remove {
		line("public_key", hex.EncodeToString(k[:]))
		line("remove", "true")
	}
	// All that is dropped comes first: an address has one peer.
	for _, p := range c.Peers {
		if len(p.Drop) == 0 {
			continue
		}
		line("public_key", hex.EncodeToString(p.Key[:]))
		line("update_only", "true")
		for _, a := range p.Drop {
			line("allowed_ip", "-"+a.String())
		}
	}
	for _, p := range c.Peers {
		line("public_key", hex.EncodeToString(p.Key[:]))
		if !p.New {
			line("update_only", "true")
		}
		if !p.Preshared.IsZero() {
			line("preshared_key", hex.EncodeToString(p.Preshared[:]))
		}
		if p.Endpoint.IsValid() {
			line("endpoint", p.Endpoint.String())
		}
		for _, a := range p.Add {
			line("allowed_ip", a.String())
		}
	}
	b.WriteString("\n")
	return b.String()
}

// parse reads a device's answer to the request for its Config. Keys that it does not know
// are passed over.
func parse(r io.Reader) (Config, error) {
	c := Config{Peers: map[Key]Peer{}}
	var current Key
	var peer Peer
	done := func() {
		if !current.IsZero() {
			slices.SortFunc(peer.Allowed, netip.Prefix.Compare)
			c.Peers[current] = peer
		}
	}
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		key, value, _ := strings.Cut(lines.Text(), "=")
		var err error
		switch key {
		case "": // the end
			return c, errors.New("read WireGuard device: no result")
		case "errno":
			if value != "0" {
				return c, fmt.Errorf("read WireGuard device: %w", errno(value))
			}
			done()
			return c, nil
		case "private_key":
			c.Private, err = parseKey(value)
		case "listen_port":
			var port uint64
			port, err = strconv.ParseUint(value, 10, 16)
			c.Port = uint16(port)
		case "public_key":
			done()
			peer = Peer{}
			current, err = parseKey(value)
		case "preshared_key":
			peer.Preshared, err = parseKey(value)
		case "endpoint":
			peer.Endpoint, err = netip.ParseAddrPort(value)
		case "allowed_ip":
			var p netip.Prefix
			p, err = netip.ParsePrefix(value)
			peer.Allowed = append(peer.Allowed, p)
		}
		if err != nil {
			return c, fmt.Errorf("read WireGuard device: %s: %w", key, err)
		}
	}
	if err := lines.Err(); err != nil {
		return c, fmt.Errorf("read WireGuard device: %w", err)
	}
	return c, fmt.Errorf("read WireGuard device: %w", io.ErrUnexpectedEOF)
}

func parseKey(text string) (Key, error) {
	var k Key
	if len(text) != 2*len(k) {
		return k, fmt.Errorf("%d characters", len(text))
	}
	_, err := hex.Decode(k[:], []byte(text))
	return k, err
}

// errno reads the error number at the end of an answer, which devices write as negative.
func errno(text string) error {
	n, err := strconv.Atoi(strings.TrimPrefix(text, "-"))
	if err != nil {
		return fmt.Errorf("result %q", text)
	}
	return unix.Errno(n)
}
