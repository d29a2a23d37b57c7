package dataplane

import (
	"slices"
	"testing"

	"github.com/miekg/dns"

	skepv1 "github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/worker/runtime"
)

// links returns the names of a container's interfaces but loopback, sorted.
func links(t *testing.T, path string) []string {
	t.Helper()
	h, err := handleAt(path)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	list, err := h.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, l := range list {
		if name := l.Attrs().Name; name != "lo" {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

func wantLinks(t *testing.T, path string, want ...string) {
	t.Helper()
	if got := links(t, path); !slices.Equal(got, want) {
		t.Errorf("the container has the interfaces %v, want %v", got, want)
	}
}

// TestNetworksOfARunningContainerChange takes a container that began on the local network
// through others and back.
func TestNetworksOfARunningContainerChange(t *testing.T) {
	l, client, _, _ := front(t)
	n := l.nodes[0]
	l.tell(&skepv1.NetworkUpdate{Endpoints: []*skepv1.OverlayEndpoint{
		endpointOf(n, "n1", "plain", "", "10.0.1.9", true), endpointOf(n, "n3", "plain", "", "10.0.3.9", true),
	}})
	path := l.attach(n, "plain").NetNS
	wantLinks(t, path, "eth0")
	attach := func(overlays ...string) {
		t.Helper()
		req := runtime.SandboxRequest{ContainerID: "plain", Name: "plain", Hostname: "plain", Mode: "bridge", Local: true}
		for _, o := range overlays {
			req.Overlays = append(req.Overlays, overlayOf(n, o))
		}
		if _, err := n.Attach(t.Context(), req); err != nil {
			t.Fatal(err)
		}
		l.wantClean()
	}
	attach("n1=10.0.1.9")
	wantLinks(t, path, "eth0", "eth1")
	wantNames(t, path, "web", dns.TypeA, "NOERROR", "10.0.1.100")
	wantNames(t, client, "plain", dns.TypeA, "NOERROR", "10.0.1.9")
	wantBoth(t, path, "tcp4", "10.0.1.100:80", "10.0.1.9")
	attach("n1=10.0.1.9", "n3=10.0.3.9")
	wantLinks(t, path, "eth0", "eth1", "eth2")
	wantBoth(t, path, "tcp4", "10.0.1.100:80", "10.0.1.9")
	attach("n3=10.0.3.9")
	wantLinks(t, path, "eth0", "eth2")
	wantNames(t, path, "web", dns.TypeA, "SERVFAIL") // asked outside, where nobody answers here
	attach()
	wantLinks(t, path, "eth0")
	if n.sandboxes["plain"] != nil {
		t.Error("a container on the local network only is still answered")
	}
	if _, err := n.Attach(t.Context(), runtime.SandboxRequest{ContainerID: "plain", Mode: "none"}); err != nil {
		t.Fatal(err)
	}
	wantLinks(t, path)
	l.wantClean()
}

// TestAFailedChangeLeavesTheContainerAsItWas asks for a network that cannot be made.
func TestAFailedChangeLeavesTheContainerAsItWas(t *testing.T) {
	l, _, _, _ := front(t)
	n := l.nodes[0]
	path := l.attach(n, "plain").NetNS
	addr := n.want.Node().GetDataAddr()
	n.want.Node().DataAddr = "nowhere"
	_, err := n.Attach(t.Context(), runtime.SandboxRequest{
		ContainerID: "plain", Mode: "bridge", Local: true, Overlays: []runtime.OverlayRequest{overlayOf(n, "n3=10.0.3.9")},
	})
	n.want.Node().DataAddr = addr
	if err == nil {
		t.Fatal("a network was made without an address for its packets")
	}
	wantLinks(t, path, "eth0")
	if got := n.state.Leases["plain"]; len(got.Overlays) != 0 || !got.Addr.IsValid() {
		t.Errorf("the container is left with %+v", got)
	}
	l.wantClean()
}
