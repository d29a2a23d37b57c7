package model

import (
	"slices"
	"strconv"
	"strings"

	"github.com/skep-dev/skep/api"
)

// How an overlay network can be encrypted.
const (
	// WireGuard carries a network's packets straight, between nodes' own keys.
	WireGuard = "wireguard"
	// ESP encrypts VXLAN packets in the kernel (RFC 4303), as Docker Engines do.
	ESP = "esp"
)

const (
	// EncryptionLabel is the engine label by which a node tells how it can encrypt:
	// ESP, WireGuard where the kernel does it, UserspaceWireGuard where a process does.
	EncryptionLabel = "skep.encryption"
	// UserspaceWireGuard is WireGuard for whoever asks what is spoken.
	UserspaceWireGuard = "wireguard-userspace"
	// WireGuardKeyLabel is the engine label with the node's public key, in hexadecimal.
	WireGuardKeyLabel = "skep.wireguard-key"
	// ESPEpochLabel is the engine label with a random number, in hexadecimal, from which the
	// node's keys for ESP follow as well. It is another one whenever the node's kernel has
	// forgotten how many packets it has sent or got with the former keys.
	ESPEpochLabel = "skep.esp-epoch"

	// EncryptedOption asks for encryption of a network, whatever its value.
	EncryptedOption = "encrypted"
	// EncryptionOption is how a network is encrypted: the leader's choice, or its creator's.
	EncryptionOption = "skep.encryption"
	// EncryptionPortOption is the UDP port that encrypted packets go to.
	EncryptionPortOption = "skep.encryption.port"
	// ESPPort is the VXLAN port of all networks encrypted by ESP, so that the kernel tells
	// them from others by it.
	ESPPort = 21819
	// ESPKeySize is the length of a key for ESP: 16 bytes of AES-128-GCM and the salt of RFC 4106.
	ESPKeySize = 16 + 4
	// FirstWireGuardPort is where the ports of networks encrypted by WireGuard begin, each
	// of which has one of its own. They are neither WireGuard's usual one, which people's own
	// tunnels have, nor among those that kernels give to whoever asks for any.
	FirstWireGuardPort = 21820

	// EncryptLabel on the swarm's spec says which new overlays are encrypted that did not
	// ask for it: EncryptAll, or none.
	EncryptLabel = "skep.encrypt"
	// EncryptAll is its value for all of them, the ingress network included.
	EncryptAll = "all"
	// RotateLabel on the swarm's spec is a number that people count up to have the keys of
	// encrypted networks changed.
	RotateLabel = "skep.encrypt.rotate"
)

// EncryptsAll reports whether new overlays of a swarm with these settings are encrypted.
func EncryptsAll(c *api.ClusterSpec) bool {
	return c.GetAnnotations().GetLabels()[EncryptLabel] == EncryptAll
}

// Encrypt asks for encryption of a network that is being made.
func Encrypt(spec *api.NetworkSpec) {
	if spec.GetDriverConfig() == nil {
		spec.DriverConfig = new(api.Driver)
	}
	if spec.GetDriverConfig().GetOptions() == nil {
		spec.DriverConfig.Options = map[string]string{}
	}
	if _, on := spec.GetDriverConfig().GetOptions()[EncryptedOption]; !on {
		spec.DriverConfig.Options[EncryptedOption] = ""
	}
}

// Encrypted reports whether encryption was asked for when a network was made.
func Encrypted(n *api.Network) bool {
	_, on := n.GetSpec().GetDriverConfig().GetOptions()[EncryptedOption]
	_, chosen := n.GetDriverState().GetOptions()[EncryptedOption]
	return on || chosen
}

// Encryption returns how a network is encrypted and on which UDP port; empty and zero
// where that was not decided.
func Encryption(n *api.Network) (string, uint16) {
	if !Encrypted(n) {
		return "", 0
	}
	options := n.GetDriverState().GetOptions()
	port, err := strconv.ParseUint(options[EncryptionPortOption], 10, 16)
	if err != nil {
		port = 0
	}
	return options[EncryptionOption], uint16(port)
}

// CanEncrypt reports whether a node can take part in a network that is encrypted so.
func CanEncrypt(n *api.Node, how string) bool {
	can := strings.Split(n.GetDescription().GetEngine().GetLabels()[EncryptionLabel], ",")
	return slices.Contains(can, how) || how == WireGuard && slices.Contains(can, UserspaceWireGuard)
}
