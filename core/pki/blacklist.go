package pki

import (
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/skep-dev/skep/api"
)

// Blacklisted is the entry by which the swarm refuses the certificate of a node that was
// removed, until that has expired.
func Blacklisted(n *api.Node) *api.BlacklistedCertificate {
	entry := new(api.BlacklistedCertificate)
	if certs, err := ParseCerts(n.GetCertificate().GetCertificate()); err == nil {
		entry.Expiry = timestamppb.New(certs[0].NotAfter)
	}
	return entry
}
