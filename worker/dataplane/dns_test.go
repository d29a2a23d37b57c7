package dataplane

import (
	"net/netip"
	"testing"

	"github.com/miekg/dns"
)

// FuzzParseReverse: a name that is read as an address is the one that stands for it.
func FuzzParseReverse(f *testing.F) {
	for _, seed := range []string{"4.1.0.10.in-addr.arpa.", "1.0.10.in-addr.arpa", "300.1.0.10.in-addr.arpa.", "x.ip6.arpa."} {
		f.Add(seed)
	}
	if name, err := dns.ReverseAddr("fd00::1"); err == nil {
		f.Add(name)
	}
	f.Fuzz(func(t *testing.T, name string) {
		addr, ok := parseReverse(name)
		if !ok {
			return
		}
		back, err := dns.ReverseAddr(addr.String())
		if err != nil {
			t.Fatalf("%q reads as %s: %v", name, addr, err)
		}
		if again, ok := parseReverse(back); !ok || again != addr {
			t.Errorf("%q reads as %s, its name %q as %s, %v", name, addr, back, again, ok)
		}
	})
}

func TestParseReverse(t *testing.T) {
	for _, text := range []string{"10.0.1.4", "fd00::1", "2001:db8:0:1::ff"} {
		want := netip.MustParseAddr(text)
		name, err := dns.ReverseAddr(text)
		if err != nil {
			t.Fatal(err)
		}
		if got, ok := parseReverse(name); !ok || got != want {
			t.Errorf("%s reads as %s, %v, want %s", name, got, ok, want)
		}
	}
}
