package enroll

import (
	"context"

	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/platform/wire"
)

// AskKey asks the manager at addr, which must have a certificate of root, for the unlock key
// of a manager that is locked and has nothing to show but a credential.
func AskKey(ctx context.Context, network wire.Network, root *pki.Root, addr, nodeID string, credential []byte) ([]byte, error) {
	nobody := &wire.Credentials{Network: network}
	nobody.Set(&wire.Material{Root: root})
	conn, err := wire.Dial(nobody, addr, pki.ManagerRole)
	if err != nil {
		return nil, err
	}
	defer conn.Close() //nolint:errcheck // nothing is lost
	call, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	resp, err := skepv1.NewUnlockClient(conn).Ask(call, &skepv1.AskUnlockRequest{NodeId: nodeID, Credential: credential})
	if err != nil {
		return nil, wire.FromStatus(err)
	}
	return resp.GetKey(), nil
}
