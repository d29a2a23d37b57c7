package containerd

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/skep-dev/skep/core/model"
)

// The files that name things in a container, kept in its directory on the host.
const (
	hostsFile    = "hosts"
	hostnameFile = "hostname"
	resolvFile   = "resolv.conf"
)

// writeNetFiles writes a container's hosts, hostname and resolv.conf.
func (e *Engine) writeNetFiles(s *saved) error {
	hosts, err := hostsText(s)
	if err != nil {
		return err
	}
	for _, f := range []struct{ name, text string }{
		{hostsFile, hosts},
		{hostnameFile, s.Config.Hostname + "\n"},
		{resolvFile, resolvText(s)},
	} {
		// Written in place: a running container sees the same file.
		if err := os.WriteFile(filepath.Join(e.containerDir(s.ID), f.name), []byte(f.text), 0o644); err != nil { //nolint:gosec // everybody in the container reads it
			return fmt.Errorf("write %s: %w", f.name, err)
		}
	}
	return nil
}

func hostsText(s *saved) (string, error) {
	var b strings.Builder
	if s.Host.NetworkMode.IsHost() {
		if own, err := os.ReadFile("/etc/hosts"); err == nil {
			b.Write(own)
		}
	} else {
		b.WriteString("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::\tip6-localnet\nff00::\tip6-mcastprefix\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n")
	}
	for _, extra := range s.Host.ExtraHosts {
		name, ip, ok := strings.Cut(extra, ":")
		if !ok || name == "" {
			return "", model.Errorf(model.Invalid, "bad format for add-host: %q", extra)
		}
		if ip == "host-gateway" {
			if s.Sandbox.Endpoint == nil || !s.Sandbox.Endpoint.Gateway.IsValid() {
				return "", model.Errorf(model.Precondition, "unable to derive the IP value for host-gateway")
			}
			ip = s.Sandbox.Endpoint.Gateway.String()
		}
		fmt.Fprintf(&b, "%s\t%s\n", strings.Trim(ip, "[]"), name)
	}
	name := s.Config.Hostname
	if s.Config.Domainname != "" {
		name += "." + s.Config.Domainname + " " + s.Config.Hostname
	}
	for _, o := range places(s) {
		fmt.Fprintf(&b, "%s\t%s\n", o.Address.Addr(), name)
		if o.Address6.IsValid() {
			fmt.Fprintf(&b, "%s\t%s\n", o.Address6.Addr(), name)
		}
	}
	if ep := s.Sandbox.Endpoint; ep != nil && ep.IPAddress.IsValid() && onBridge(s) {
		fmt.Fprintf(&b, "%s\t%s\n", ep.IPAddress, name)
	}
	return b.String(), nil
}

func resolvText(s *saved) string {
	sb := s.Sandbox
	if len(sb.Nameservers)+len(sb.Search)+len(sb.Options)+len(s.Host.DNS)+len(s.Host.DNSSearch)+len(s.Host.DNSOptions) == 0 {
		own, err := os.ReadFile("/etc/resolv.conf")
		if err != nil {
			return ""
		}
		return string(own)
	}
	servers, search, options := sb.Nameservers, sb.Search, sb.Options
	if len(s.Host.DNS) > 0 && len(s.Overlays) == 0 { // else the network's resolver asks them
		servers = nil
		for _, a := range s.Host.DNS {
			servers = append(servers, a.String())
		}
	}
	if len(s.Host.DNSSearch) > 0 {
		search = s.Host.DNSSearch
	}
	if len(s.Host.DNSOptions) > 0 {
		options = s.Host.DNSOptions
	}
	var b strings.Builder
	for _, n := range servers {
		fmt.Fprintf(&b, "nameserver %s\n", n)
	}
	if len(search) > 0 && (len(search) != 1 || search[0] != ".") {
		fmt.Fprintf(&b, "search %s\n", strings.Join(search, " "))
	}
	if len(options) > 0 {
		fmt.Fprintf(&b, "options %s\n", strings.Join(options, " "))
	}
	return b.String()
}
