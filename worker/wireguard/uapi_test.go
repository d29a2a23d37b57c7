package wireguard

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

func key(b byte) Key { return Key{b, 31: 0x40} }

func prefixes(list ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, p := range list {
		out = append(out, netip.MustParsePrefix(p))
	}
	return out
}

func comparePrefixes() cmp.Option {
	return cmp.Options{
		cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }), cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b }),
		cmpopts.EquateEmpty(),
	}
}

func TestDiff(t *testing.T) {
	at := netip.MustParseAddrPort("192.0.2.1:51820")
	elsewhere := netip.MustParseAddrPort("192.0.2.9:4444")
	full := func(allowed ...string) Peer {
		return Peer{Preshared: key(9), Endpoint: at, Allowed: prefixes(allowed...)}
	}
	for _, c := range []struct {
		name       string
		want, have map[Key]Peer
		moved      map[Key]bool
		peers      []Change
		remove     []Key
	}{
		{name: "nothing", want: map[Key]Peer{key(1): full("10.0.0.2/32")}, have: map[Key]Peer{key(1): full("10.0.0.2/32")}},
		{
			name: "a new peer", want: map[Key]Peer{key(1): full("10.0.0.2/32")},
			peers: []Change{{Key: key(1), New: true, Preshared: key(9), Endpoint: at, Add: prefixes("10.0.0.2/32")}},
		},
		{name: "a new peer without preshared key waits", want: map[Key]Peer{key(1): {Endpoint: at, Allowed: prefixes("10.0.0.2/32")}}},
		{
			name: "a known peer keeps its preshared key",
			want: map[Key]Peer{key(1): {Endpoint: at, Allowed: prefixes("10.0.0.3/32")}}, have: map[Key]Peer{key(1): full("10.0.0.2/32")},
			peers: []Change{{Key: key(1), Add: prefixes("10.0.0.3/32"), Drop: prefixes("10.0.0.2/32")}},
		},
		{
			name: "rotation", want: map[Key]Peer{key(1): {Preshared: key(8), Endpoint: at}}, have: map[Key]Peer{key(1): full()},
			peers: []Change{{Key: key(1), Preshared: key(8)}},
		},
		{name: "a peer that was heard from elsewhere", want: map[Key]Peer{key(1): full()}, have: map[Key]Peer{key(1): {Preshared: key(9), Endpoint: elsewhere}}},
		{
			name: "a peer that moved", want: map[Key]Peer{key(1): full()}, have: map[Key]Peer{key(1): {Preshared: key(9), Endpoint: elsewhere}},
			moved: map[Key]bool{key(1): true}, peers: []Change{{Key: key(1), Endpoint: at}},
		},
		{name: "a peer that left", have: map[Key]Peer{key(1): full(), key(0): full()}, remove: []Key{key(0), key(1)}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := Diff(Config{Peers: c.want}, Config{Peers: c.have}, c.moved)
			if d := cmp.Diff(Changes{Peers: c.peers, Remove: c.remove}, got, comparePrefixes()); d != "" {
				t.Error(d)
			}
			if got.Empty() != (len(c.peers)+len(c.remove) == 0) {
				t.Errorf("empty is %v", got.Empty())
			}
		})
	}
}

func TestEncodeDropsBeforeItAdds(t *testing.T) {
	text := encode(Changes{Peers: []Change{
		{Key: key(1), Add: prefixes("10.0.0.2/32")},
		{Key: key(2), Drop: prefixes("10.0.0.2/32")},
	}})
	drop, add := strings.Index(text, "allowed_ip=-10.0.0.2/32"), strings.Index(text, "allowed_ip=10.0.0.2/32")
	if drop < 0 || add < drop {
		t.Errorf("dropped at %d, added at %d of\n%s", drop, add, text)
	}
}

// sample is what a device answers.
const sample = `private_key=0100000000000000000000000000000000000000000000000000000000000040
listen_port=51820
public_key=0200000000000000000000000000000000000000000000000000000000000040
preshared_key=0900000000000000000000000000000000000000000000000000000000000040
protocol_version=1
endpoint=192.0.2.1:51820
last_handshake_time_sec=0
allowed_ip=10.0.1.4/32
allowed_ip=10.0.1.3/32
public_key=0300000000000000000000000000000000000000000000000000000000000040
errno=0

`

func TestParse(t *testing.T) {
	got, err := parse(strings.NewReader(sample))
	if err != nil {
		t.Fatal(err)
	}
	want := Config{Private: key(1), Port: 51820, Peers: map[Key]Peer{
		key(2): {Preshared: key(9), Endpoint: netip.MustParseAddrPort("192.0.2.1:51820"), Allowed: prefixes("10.0.1.3/32", "10.0.1.4/32")},
		key(3): {},
	}}
	if d := cmp.Diff(want, got, comparePrefixes()); d != "" {
		t.Error(d)
	}
	for _, bad := range []string{"", "errno=-98\n\n", "\n", "listen_port=70000\nerrno=0\n", "public_key=12\nerrno=0\n", "errno=x\n"} {
		if c, err := parse(strings.NewReader(bad)); err == nil {
			t.Errorf("%q was read as %v", bad, c)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(sample)
	f.Add("errno=-1\n\n")
	f.Fuzz(func(t *testing.T, text string) {
		c, err := parse(strings.NewReader(text))
		if err != nil {
			return
		}
		if changes := Diff(c, c, nil); !changes.Empty() {
			t.Errorf("a device differs from itself: %v", changes)
		}
	})
}

func TestKeys(t *testing.T) {
	a, err := NewPrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	if a.Public().IsZero() || a.Public() == a || !(Key{}).Public().IsZero() {
		t.Errorf("private %x, public %x", a, a.Public())
	}
}
