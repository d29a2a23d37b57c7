package enroll

import (
	"context"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/platform/wire"
)

// ErrDocker is what CheckManager returns in a swarm that Docker Engine manages.
var ErrDocker = &model.Error{
	Kind: model.Precondition,
	Text: "this swarm is managed by Docker Engine: a Skep node can be a worker of it but not a manager",
}

// CheckManager returns ErrDocker if the manager at addr is Docker's, nil if it is Skep's,
// and another error if it does not say.
func CheckManager(ctx context.Context, creds *wire.Credentials, addr string) error {
	conn, err := wire.Dial(creds, addr, pki.ManagerRole)
	if err != nil {
		return err
	}
	defer conn.Close() //nolint:errcheck // nothing is lost
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	// A report for no session changes nothing. Skep's managers refuse it in one way or
	// another; Docker's do not know the service.
	_, err = skepv1.NewNetworksClient(conn).Programmed(ctx, new(skepv1.ProgrammedRequest))
	switch status.Code(err) {
	case codes.Unimplemented:
		return ErrDocker
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled:
		return err
	default:
		return nil
	}
}
