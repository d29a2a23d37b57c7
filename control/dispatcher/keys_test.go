package dispatcher

import (
	"bytes"
	"crypto/rand"
	"slices"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
)

// TestOverlayKeysStayWithTheManagers: no node is told the keys that others' are derived from.
// Docker Engines, which insist on some, are told others, all the same.
func TestOverlayKeysStayWithTheManagers(t *testing.T) {
	c := new(api.Cluster)
	if err := pki.FirstNetworkKeys(c, rand.Reader); err != nil {
		t.Fatal(err)
	}
	engine := func(network string) *api.Node {
		plugin := &api.PluginDescription{Type: "Network", Name: network}
		return &api.Node{Description: &api.NodeDescription{Engine: &api.EngineDescription{Plugins: []*api.PluginDescription{plugin}}}}
	}
	for name, tc := range map[string]struct {
		node          *api.Node
		gossip, ipsec int
	}{
		"a Skep node":                 {engine(model.SkepOverlay), 3, 0},
		"who has not said what it is": {new(api.Node), 3, 0},
		"a Docker Engine":             {engine("overlay"), 3, 3},
	} {
		got := networkKeys(c, tc.node)
		count := map[string]int{}
		for _, k := range got {
			count[k.GetSubsystem()]++
			for _, of := range c.GetNetworkBootstrapKeys() {
				same := bytes.Equal(k.GetKey(), of.GetKey())
				if same != (k.GetSubsystem() == pki.GossipKeys && k.GetLamportTime() == of.GetLamportTime()) || len(k.GetKey()) != len(of.GetKey()) {
					t.Errorf("%s is told key %d of %s: %t", name, of.GetLamportTime(), of.GetSubsystem(), same)
				}
			}
		}
		if count[pki.GossipKeys] != tc.gossip || count[pki.OverlayKeys] != tc.ipsec {
			t.Errorf("%s is told %v keys", name, count)
		}
		if again := networkKeys(c, tc.node); !slices.EqualFunc(got, again, func(a, b *api.EncryptionKey) bool { return proto.Equal(a, b) }) {
			t.Errorf("%s is told other keys the next time", name)
		}
	}
}
