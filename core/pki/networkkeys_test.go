package pki

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"github.com/skep-dev/skep/api"
)

func TestNetworkKeys(t *testing.T) {
	random := rand.NewChaCha8([32]byte{1})
	c := new(api.Cluster)
	if newest(c, OverlayKeys) != nil {
		t.Error("a key before there is any")
	}
	if err := FirstNetworkKeys(c, random); err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for round := range 10 {
		subsystems := []string{OverlayKeys}
		if round%3 == 0 {
			subsystems = append(subsystems, GossipKeys)
		}
		before := map[string][]byte{GossipKeys: newest(c, GossipKeys), OverlayKeys: newest(c, OverlayKeys)}
		if err := RotateNetworkKeys(c, random, subsystems...); err != nil {
			t.Fatal(err)
		}
		counts, times := map[string]int{}, map[uint64]bool{}
		var last uint64
		for _, k := range c.GetNetworkBootstrapKeys() {
			counts[k.GetSubsystem()]++
			if times[k.GetLamportTime()] || k.GetLamportTime() > c.GetEncryptionKeyLamportClock() || len(k.GetKey()) != 16 {
				t.Errorf("round %d: key %v", round, k)
			}
			times[k.GetLamportTime()] = true
			last = max(last, k.GetLamportTime())
		}
		if counts[GossipKeys] != 3 || counts[OverlayKeys] != 3 || last != c.GetEncryptionKeyLamportClock() {
			t.Errorf("round %d: %v keys, the newest of %d", round, counts, last)
		}
		for subsystem, key := range before {
			rotated := subsystem == OverlayKeys || round%3 == 0
			if now := newest(c, subsystem); bytes.Equal(now, key) == rotated || rotated && seen[string(now)] {
				t.Errorf("round %d: key of %s was %x, is %x", round, subsystem, key, now)
			} else {
				seen[string(now)] = true
			}
		}
	}
}

func newest(c *api.Cluster, subsystem string) []byte {
	if keys := NetworkKeys(c, subsystem); len(keys) > 0 {
		return keys[0].GetKey()
	}
	return nil
}
