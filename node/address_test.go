package node

import (
	"net/netip"
	"strings"
	"testing"
)

func testLinks() []link {
	return []link{
		{name: "lo", loopback: true, addrs: []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("::1")}},
		{name: "docker0", addrs: []netip.Addr{netip.MustParseAddr("172.17.0.1")}},
		{name: "ing0a1b2c3d", addrs: []netip.Addr{netip.MustParseAddr("172.18.0.1")}},
		{name: "eth0", addrs: []netip.Addr{netip.MustParseAddr("10.0.0.5"), netip.MustParseAddr("fe80::1")}},
	}
}

func TestResolveAddresses(t *testing.T) {
	tests := map[string]struct {
		links             []link
		listen, advertise string
		want, wantErr     string
	}{
		"all default":          {testLinks(), "0.0.0.0:2377", "", "10.0.0.5:2377", ""},
		"listen is advertised": {testLinks(), "10.0.0.5:4000", "", "10.0.0.5:4000", ""},
		"interface":            {testLinks(), "0.0.0.0", "eth0", "10.0.0.5:2377", ""},
		"interface and port":   {testLinks(), "0.0.0.0:2400", "eth0:2500", "10.0.0.5:2500", ""},
		"port of listener":     {testLinks(), "0.0.0.0:2400", "10.0.0.9", "10.0.0.9:2400", ""},
		"ipv6":                 {testLinks(), "[::]:2377", "[2001:db8::1]:2377", "[2001:db8::1]:2377", ""},
		"empty listen":         {testLinks(), "", "", "", `invalid ListenAddr ""`},
		"bad listen":           {testLinks(), "nowhere:2377", "", "", "listen address must be an IP address"},
		"zero advertise":       {testLinks(), "0.0.0.0:2377", "0.0.0.0", "", "advertise address must be a non-zero"},
		"bad port":             {testLinks(), "0.0.0.0:99999", "", "", "listen address must be"},
		"none":                 {testLinks()[:1], "0.0.0.0:2377", "", "", "could not find the system's IP address"},
		"two interfaces": {
			append(testLinks(), link{name: "eth1", addrs: []netip.Addr{netip.MustParseAddr("10.1.0.5")}}),
			"0.0.0.0:2377", "", "", "on different interfaces (10.0.0.5 on eth0 and 10.1.0.5 on eth1)",
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			listen, err := resolveListen(test.links, test.listen)
			var got netip.AddrPort
			if err == nil {
				got, err = resolveAdvertise(test.links, test.advertise, listen)
			}
			switch {
			case test.wantErr != "":
				if err == nil || !strings.Contains(err.Error(), test.wantErr) {
					t.Fatalf("got %v, %v, want error %q", got, err, test.wantErr)
				}
			case err != nil:
				t.Fatal(err)
			case got.String() != test.want:
				t.Fatalf("got %s, want %s", got, test.want)
			}
		})
	}
}

func TestResolveDataPath(t *testing.T) {
	if got, err := resolveDataPath(testLinks(), "eth0"); err != nil || got != "10.0.0.5" {
		t.Errorf("got %q, %v", got, err)
	}
	if _, err := resolveDataPath(testLinks(), "0.0.0.0"); err == nil {
		t.Error("0.0.0.0 was accepted")
	}
}

func TestWithDefaultPort(t *testing.T) {
	for in, want := range map[string]string{
		"10.0.0.1": "10.0.0.1:2377", "10.0.0.1:1": "10.0.0.1:1", "m1": "m1:2377", "::1": "[::1]:2377", "[::1]": "[::1]:2377", "[::1]:5": "[::1]:5",
	} {
		if got := withDefaultPort(in); got != want {
			t.Errorf("withDefaultPort(%q) = %q, want %q", in, got, want)
		}
	}
}
