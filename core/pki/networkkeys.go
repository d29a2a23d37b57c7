package pki

import (
	"cmp"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"slices"

	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api"
)

// Subsystems are the users of the cluster's network keys, by the names that Docker members
// know.
const (
	// GossipKeys protect Docker's endpoint gossip.
	GossipKeys = "networking:gossip"
	// OverlayKeys are what encrypted overlay traffic depends on.
	OverlayKeys = "networking:ipsec"
)

const (
	networkKeySize = 16
	// networkKeys is how many keys each subsystem has: the newest, the one in use, and one
	// for stragglers. Docker members refuse any other number.
	networkKeys = 3
)

// FirstNetworkKeys gives a cluster, which it changes, the first keys of both subsystems.
func FirstNetworkKeys(c *api.Cluster, random io.Reader) error {
	var start [2]byte
	if _, err := io.ReadFull(random, start[:]); err != nil {
		return fmt.Errorf("make network keys: %w", err)
	}
	c.EncryptionKeyLamportClock = uint64(binary.BigEndian.Uint16(start[:]))
	c.NetworkBootstrapKeys = nil
	for _, subsystem := range []string{GossipKeys, OverlayKeys} {
		for range networkKeys {
			if err := addNetworkKey(c, random, subsystem); err != nil {
				return err
			}
		}
	}
	return nil
}

// RotateNetworkKeys replaces the oldest key of each subsystem named by a new one.
func RotateNetworkKeys(c *api.Cluster, random io.Reader, subsystems ...string) error {
	for _, subsystem := range subsystems {
		if err := addNetworkKey(c, random, subsystem); err != nil {
			return err
		}
		for count, oldest := oldestNetworkKey(c, subsystem); count > networkKeys; count, oldest = oldestNetworkKey(c, subsystem) {
			keys := c.GetNetworkBootstrapKeys()
			c.NetworkBootstrapKeys = append(keys[:oldest:oldest], keys[oldest+1:]...)
		}
	}
	return nil
}

// addNetworkKey appends a key. Its time is unique over both subsystems, since Docker members
// know keys by nothing else.
func addNetworkKey(c *api.Cluster, random io.Reader, subsystem string) error {
	key := make([]byte, networkKeySize)
	if _, err := io.ReadFull(random, key); err != nil {
		return fmt.Errorf("make network key: %w", err)
	}
	c.EncryptionKeyLamportClock++
	c.NetworkBootstrapKeys = append(c.NetworkBootstrapKeys, &api.EncryptionKey{
		Subsystem: subsystem, Algorithm: api.EncryptionKey_AES_128_GCM, Key: key, LamportTime: c.EncryptionKeyLamportClock,
	})
	return nil
}

// oldestNetworkKey counts the keys of a subsystem and finds the oldest, -1 without any.
func oldestNetworkKey(c *api.Cluster, subsystem string) (count, oldest int) {
	oldest = -1
	for i, k := range c.GetNetworkBootstrapKeys() {
		if k.GetSubsystem() != subsystem {
			continue
		}
		count++
		if oldest < 0 || k.GetLamportTime() < c.GetNetworkBootstrapKeys()[oldest].GetLamportTime() {
			oldest = i
		}
	}
	return count, oldest
}

// NetworkKeys returns the keys of a subsystem, newest first.
func NetworkKeys(c *api.Cluster, subsystem string) []*api.EncryptionKey {
	var out []*api.EncryptionKey
	for _, k := range c.GetNetworkBootstrapKeys() {
		if k.GetSubsystem() == subsystem {
			out = append(out, k)
		}
	}
	slices.SortFunc(out, func(a, b *api.EncryptionKey) int { return cmp.Compare(b.GetLamportTime(), a.GetLamportTime()) })
	return out
}

// DockerKey returns what Docker Engines are told in the place of a key: one that does not lead
// back to it.
func DockerKey(k *api.EncryptionKey) *api.EncryptionKey {
	h := hmac.New(sha256.New, k.GetKey())
	h.Write([]byte("docker engine " + k.GetSubsystem()))
	out := proto.CloneOf(k)
	out.Key = h.Sum(nil)[:networkKeySize]
	return out
}
