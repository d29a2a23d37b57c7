// Package enroll is a node's side of getting certificates: it fetches and pins the root of
// a swarm, asks for the first certificate with a join token, and renews the certificate
// for the rest of the node's life.
//
// It keeps no state of its own: identities go to the caller, who stores and activates
// them. Issuing is for control/ca.
package enroll

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/platform/keystore"
	"github.com/skep-dev/skep/platform/wire"
)

const (
	callTimeout = 5 * time.Second
	attempts    = 5
	retryAfter  = 2 * time.Second
)

// Join gets an identity from a swarm that the token admits to: at addr, host:port, of a
// network, which is TCP when nil. Errors carry the texts that Docker's users know.
func Join(ctx context.Context, network wire.Network, addr, token string, availability api.NodeSpec_Availability) (keystore.Identity, error) {
	parsed, err := pki.ParseToken(token)
	if token != "" && err != nil {
		return keystore.Identity{}, err
	}
	rootPEM, err := FetchRoot(ctx, network, addr)
	if err != nil {
		return keystore.Identity{}, err
	}
	if token != "" {
		if err := parsed.Pins(rootPEM); err != nil {
			return keystore.Identity{}, err
		}
	}
	root, err := pki.ParseRoot(rootPEM, nil)
	if err != nil {
		return keystore.Identity{}, err
	}
	creds := &wire.Credentials{Network: network}
	creds.Set(&wire.Material{Root: root})
	conn, err := wire.Dial(creds, addr, pki.CARole)
	if err != nil {
		return keystore.Identity{}, err
	}
	defer conn.Close() //nolint:errcheck // nothing is lost
	for left := attempts; ; left-- {
		key, chain, err := request(ctx, conn, root, &api.IssueNodeCertificateRequest{Token: token, Availability: availability}, "")
		if err == nil {
			return keystore.Identity{RootPEM: rootPEM, ChainPEM: chain, Key: key}, nil
		}
		if left == 1 || !passing(err) || sleep(ctx, retryAfter) != nil {
			return keystore.Identity{}, err
		}
	}
}

// passing reports whether an error comes from a swarm that is busy or between leaders.
func passing(err error) bool {
	switch status.Code(err) {
	case codes.ResourceExhausted, codes.Aborted, codes.Unavailable:
		return true
	default:
		return errors.Is(wire.FromStatus(err), model.ErrNoLeader)
	}
}

// FetchRoot downloads the root bundle from a manager that is not trusted yet: the caller
// must find a reason to trust it. Errors that will not pass are returned at once.
func FetchRoot(ctx context.Context, network wire.Network, addr string) ([]byte, error) {
	conn, err := wire.DialUnverified(network, addr)
	if err != nil {
		return nil, err
	}
	defer conn.Close() //nolint:errcheck // nothing is lost
	var last error
	for range attempts {
		call, cancel := context.WithTimeout(ctx, callTimeout)
		resp, err := api.NewCAClient(conn).GetRootCACertificate(call, new(api.GetRootCACertificateRequest))
		cancel()
		if err == nil {
			return resp.GetCertificate(), nil
		}
		if last = err; status.Code(err) == codes.Unavailable && ctx.Err() == nil {
			return nil, err // refused: nobody listens there
		}
		if err := sleep(ctx, retryAfter); err != nil {
			return nil, last
		}
	}
	return nil, last
}

// request makes a key and gets a certificate for it. role, if set, is the organizational
// unit that the certificate must have.
func request(ctx context.Context, conn grpc.ClientConnInterface, root *pki.Root, req *api.IssueNodeCertificateRequest, role string) (crypto.Signer, []byte, error) {
	key, err := pki.NewKey(rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	if req.Csr, err = pki.NewCSR(rand.Reader, key); err != nil {
		return nil, nil, err
	}
	call, cancel := context.WithTimeout(ctx, callTimeout)
	issued, err := api.NewNodeCAClient(conn).IssueNodeCertificate(call, req)
	cancel()
	if err != nil {
		return nil, nil, err
	}
	chain, err := await(ctx, conn, issued.GetNodeId(), req.GetCsr())
	if err != nil {
		return nil, nil, err
	}
	leaf, err := root.Verify(chain, time.Now())
	if err != nil {
		return nil, nil, err
	}
	if role != "" && (len(leaf.Subject.OrganizationalUnit) == 0 || leaf.Subject.OrganizationalUnit[0] != role) {
		return nil, nil, model.Errorf(model.Unavailable, "the certificate issued does not have role %s yet", role)
	}
	return key, chain, nil
}

// await polls until the certificate for a request is issued.
func await(ctx context.Context, conn grpc.ClientConnInterface, nodeID string, csr []byte) ([]byte, error) {
	failures := 0
	for wait := time.Second; ; wait = min(wait+time.Second, 30*time.Second) {
		call, cancel := context.WithTimeout(ctx, callTimeout)
		resp, err := api.NewNodeCAClient(conn).NodeCertificateStatus(call, &api.NodeCertificateStatusRequest{NodeId: nodeID})
		cancel()
		switch code := status.Code(err); {
		case err == nil:
			state := resp.GetStatus().GetState()
			if (state == api.IssuanceStatus_ISSUED || state == api.IssuanceStatus_ROTATE) && string(resp.GetCertificate().GetCsr()) == string(csr) {
				return resp.GetCertificate().GetCertificate(), nil
			}
			if state == api.IssuanceStatus_FAILED {
				return nil, model.Errorf(model.Denied, "the swarm did not issue a certificate: %s", resp.GetStatus().GetErr())
			}
		case code == codes.DeadlineExceeded && ctx.Err() == nil:
			continue // still pending; the server waited
		case passing(err) && failures < attempts:
			failures++ // the request is recorded: asking anew would make another node
		default:
			return nil, err
		}
		if err := sleep(ctx, wait); err != nil {
			return nil, err
		}
	}
}

// UnlockKey asks a manager for the key encryption key and its version. The key is empty
// unless the swarm locks its managers.
func UnlockKey(ctx context.Context, creds *wire.Credentials, addr string) (kek []byte, version uint64, err error) {
	conn, err := wire.Dial(creds, addr, pki.CARole)
	if err != nil {
		return nil, 0, err
	}
	defer conn.Close() //nolint:errcheck // nothing is lost
	for left := attempts; ; left-- {
		call, cancel := context.WithTimeout(ctx, callTimeout)
		resp, err := api.NewCAClient(conn).GetUnlockKey(call, new(api.GetUnlockKeyRequest))
		cancel()
		switch {
		case status.Code(err) == codes.Unimplemented:
			return nil, 0, nil
		case err == nil:
			return resp.GetUnlockKey(), resp.GetVersion().GetIndex(), nil
		case left == 1 || !passing(err) || sleep(ctx, retryAfter) != nil:
			return nil, 0, err
		}
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// Unverified reports whether err says that a certificate does not fit the known root.
func Unverified(err error) bool {
	_, ok := errors.AsType[*tls.CertificateVerificationError](err)
	return ok
}

// wrap says what was attempted.
func wrap(what string, err error) error { return fmt.Errorf("%s: %w", what, err) }
