package enroll

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"google.golang.org/grpc"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/platform/keystore"
	"github.com/skep-dev/skep/platform/wire"
)

const (
	// settle gathers the reasons for a renewal that come together.
	settle       = 500 * time.Millisecond
	backoffStep  = 5 * time.Second
	backoffLimit = time.Hour
	// returnLimit is the same for a node whose certificate has expired, which can do nothing
	// else.
	returnLimit = time.Minute
	// forcedRetry is how often a renewal that was asked for is tried at first.
	forcedRetry = time.Second
)

// Renewer keeps a node's certificate fresh.
type Renewer struct {
	Credentials *wire.Credentials
	// Connect reaches a manager with the current certificate; done gives it back.
	Connect func(ctx context.Context) (conn grpc.ClientConnInterface, done func(), err error)
	// Return gets an identity when the certificate has expired. Denied ends the Renewer, for
	// the node has no place in the swarm any more. Nil leaves such a certificate to Connect,
	// as does ok false.
	Return func(ctx context.Context) (id keystore.Identity, ok bool, err error)
	// Save makes a new identity durable and active.
	Save func(ctx context.Context, id keystore.Identity) error
	Log  *slog.Logger

	// force carries the role that a renewal must bring; "" for any.
	force chan string
}

// NewRenewer returns a Renewer that does nothing before Run. All fields must be set.
func NewRenewer(r Renewer) *Renewer {
	r.force = make(chan string, 1)
	return &r
}

// Force asks for a renewal now. role is what the new certificate must say, pki.ManagerRole
// or pki.WorkerRole, or "" for whatever the swarm issues. A later call replaces an earlier
// one that has not begun.
func (r *Renewer) Force(role string) {
	for {
		select {
		case r.force <- role:
			return
		default:
		}
		select {
		case <-r.force:
		default:
		}
	}
}

// Run renews until ctx ends.
func (r *Renewer) Run(ctx context.Context) error {
	for {
		at, err := pki.RenewAt(r.Credentials.Current().Leaf, rand.Reader)
		if err != nil {
			return wrap("plan renewal", err)
		}
		timer := time.NewTimer(time.Until(at))
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
			err = r.repeat(ctx, "", backoffStep)
		case role := <-r.force:
			timer.Stop()
			if sleep(ctx, settle) != nil {
				return nil //nolint:nilerr // ended, as asked
			}
			select {
			case role = <-r.force:
			default:
			}
			err = r.repeat(ctx, role, forcedRetry)
		}
		if errors.Is(err, errNotTaken) {
			return err
		}
		if err != nil {
			return nil //nolint:nilerr // else only ctx ends the repetition
		}
	}
}

// repeat renews until it succeeds; the pauses grow by step. A new demand replaces role.
func (r *Renewer) repeat(ctx context.Context, role string, step time.Duration) error {
	for wait := step; ; wait = min(wait+step, backoffLimit) {
		err := r.renew(ctx, role)
		if err == nil {
			return nil
		}
		if errors.Is(err, errNotTaken) {
			return err
		}
		if r.expired() {
			wait = min(wait, returnLimit)
		}
		r.Log.Warn("certificate not renewed, trying again", slog.Any("error", err), slog.Duration("wait", wait))
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		case role = <-r.force:
			timer.Stop()
			wait = 0
		case <-timer.C:
		}
	}
}

func (r *Renewer) renew(ctx context.Context, role string) error {
	if returned, err := r.comeBack(ctx); returned || err != nil {
		return err
	}
	conn, done, err := r.Connect(ctx)
	if err != nil {
		return err
	}
	defer done()
	now := r.Credentials.Current()
	key, chain, err := request(ctx, conn, now.Root, new(api.IssueNodeCertificateRequest), role)
	if err != nil {
		return err
	}
	// The root may have been replaced meanwhile.
	return r.save(ctx, keystore.Identity{RootPEM: r.Credentials.Current().Root.CertPEM, ChainPEM: chain, Key: key})
}

// comeBack returns with an expired certificate. returned is false where it has not expired
// or needs nobody else.
func (r *Renewer) comeBack(ctx context.Context) (returned bool, err error) {
	if r.Return == nil || !r.expired() {
		return false, nil
	}
	id, ok, err := r.Return(ctx)
	switch {
	case model.KindOf(err) == model.Denied:
		return false, fmt.Errorf("%w: %w", errNotTaken, err)
	case err != nil || !ok:
		return false, err
	default:
		return true, r.save(ctx, id)
	}
}

func (r *Renewer) expired() bool { return time.Now().After(r.Credentials.Current().Leaf.NotAfter) }

// errNotTaken says that the swarm does not take this node back.
var errNotTaken = model.Errorf(model.Denied, "Swarm certificates have expired. To replace them, leave the swarm and join again.")

func (r *Renewer) save(ctx context.Context, id keystore.Identity) error {
	if err := r.Save(ctx, id); err != nil {
		return err
	}
	r.Log.Info("certificate renewed", slog.String("node_id", r.Credentials.NodeID()), slog.String("role", r.Credentials.Role()))
	return nil
}
