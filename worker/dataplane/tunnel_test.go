package dataplane

import (
	"net/netip"
	"testing"

	skepv1 "github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime"
)

// sealedIngress are the networks of most tests, the ingress network encrypted and with IPv6.
func sealedIngress() []*skepv1.OverlayNetwork {
	list := nets()
	list[0].Encrypted, list[0].Encryption, list[0].EncryptionPort = true, model.WireGuard, 51822
	return list
}

// sealedEdge is a lab like edge, with an encrypted ingress network.
func sealedEdge(t *testing.T) (l *lab, outside string, tasks []runtime.Sandbox) {
	t.Helper()
	l = newLab(t, 3)
	if len(l.nodes[0].encryption) == 0 {
		t.Skip("this kernel has neither WireGuard nor TUN")
	}
	if !l.nodes[0].keepsSource {
		t.Skip("the kernel cannot answer clients by their own addresses")
	}
	l.tell(&skepv1.NetworkUpdate{
		Complete: true, Networks: sealedIngress(), Services: []*skepv1.BalancedService{web(8080)},
		Endpoints: append(l.legs(), kept(l.nodes[0], "web.1", "10.0.0.3"), kept(l.nodes[1], "web.2", "10.0.0.4")),
	})
	l.tellPeers(1, sealedIngress()[0])
	tasks = []runtime.Sandbox{l.attach(l.nodes[0], "web.1", "ingress=10.0.0.3"), l.attach(l.nodes[1], "web.2", "ingress=10.0.0.4")}
	echo(t, tasks[0].NetNS, 80, "web.1")
	echo(t, tasks[1].NetNS, 80, "web.2")
	return l, l.host("outside", netip.MustParseAddr("192.0.2.50")), tasks
}

func TestEncryptedIngressKeepsClientAddress(t *testing.T) {
	l, outside, _ := sealedEdge(t)
	for _, n := range l.nodes {
		for _, network := range []string{"tcp4", "udp4"} {
			wantBoth(t, outside, network, n.addr.String()+":8080", "192.0.2.50")
		}
	}
	l.wantClean()
}
