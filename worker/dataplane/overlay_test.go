package dataplane

import (
	"testing"

	"github.com/miekg/dns"

	skepv1 "github.com/skep-dev/skep/api/skepv1"
)

func TestOverlayAcrossNodes(t *testing.T) {
	l := newLab(t, 2)
	a, b := l.nodes[0], l.nodes[1]
	web := &skepv1.BalancedService{Id: "s1", Name: "web", Virtual: true, Vips: []*skepv1.VirtualAddress{{NetworkId: "n1", Addr: "10.0.1.100/24"}}}
	l.tell(&skepv1.NetworkUpdate{Complete: true, Networks: nets(), Services: []*skepv1.BalancedService{web}, Endpoints: append(l.legs(),
		endpointOf(a, "n1", "client", "", "10.0.1.2", true),
		endpointOf(a, "n1", "web.1", "s1", "10.0.1.3", true),
		endpointOf(b, "n1", "web.2", "s1", "10.0.1.4", true),
	)})
	client := l.attach(a, "client", "n1=10.0.1.2").NetNS
	web1 := l.attach(a, "web.1", "n1=10.0.1.3").NetNS
	web2 := l.attach(b, "web.2", "n1=10.0.1.4").NetNS
	echo(t, web1, 80, "web.1")
	echo(t, web2, 80, "web.2")
	wantWho(t, client, "tcp4", "10.0.1.3:80", "web.1", "10.0.1.2")
	wantWho(t, client, "tcp4", "10.0.1.4:80", "web.2", "10.0.1.2")
	wantWho(t, client, "udp4", "10.0.1.4:80", "web.2", "10.0.1.2")
	if err := ping(client, "10.0.1.4"); err != nil {
		t.Errorf("ping across nodes: %v", err)
	}
	if err := ping(client, "10.0.1.100"); err != nil {
		t.Errorf("ping to a service address: %v", err)
	}
	seen := map[string]int{}
	for range 40 {
		for _, network := range []string{"tcp4", "udp4"} {
			name, from, err := whoIn(client, network, "10.0.1.100:80")
			if err != nil || from != "10.0.1.2" {
				t.Fatalf("%s to the service: %q saw %q, %v", network, name, from, err)
			}
			seen[network+name]++
		}
	}
	if len(seen) != 4 {
		t.Errorf("not balanced over both tasks by both protocols: %v", seen)
	}
	wantNames(t, client, "web", dns.TypeA, "NOERROR", "10.0.1.100")
	wantNames(t, client, "tasks.web", dns.TypeA, "NOERROR", "10.0.1.3", "10.0.1.4")
	wantNames(t, client, "web", dns.TypeAAAA, "NOERROR")
	wantNames(t, client, "web.2", dns.TypeA, "NOERROR", "10.0.1.4")
	l.wantClean()
}
