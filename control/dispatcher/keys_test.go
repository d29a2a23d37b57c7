package dispatcher

import (
	"testing"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
)

// TestOverlayKeysStayWithTheManagers: Docker's members need them, Skep's nodes do not.
func TestOverlayKeysStayWithTheManagers(t *testing.T) {
	c := &api.Cluster{NetworkBootstrapKeys: []*api.EncryptionKey{{Subsystem: pki.GossipKeys}, {Subsystem: pki.OverlayKeys}}}
	labels := map[string]string{model.EncryptionLabel: model.WireGuard}
	ours := &api.Node{Description: &api.NodeDescription{Engine: &api.EngineDescription{Labels: labels}}}
	for _, k := range networkKeys(c, ours) {
		if k.GetSubsystem() == pki.OverlayKeys {
			t.Error("a Skep node is told the key that others' are derived from")
		}
	}
	if n := len(networkKeys(c, new(api.Node))); n != 2 {
		t.Errorf("a Docker Engine is told %d keys, want both", n)
	}
	if n := len(c.GetNetworkBootstrapKeys()); n != 2 {
		t.Errorf("the stored cluster has %d keys left", n)
	}
}
