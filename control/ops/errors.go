package ops

import (
	"context"
	"errors"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/skep-dev/skep/core/model"
)

// fail gives an error the gRPC status that SwarmKit's clients expect: stale versions
// and a missing leader are Unknown there, which Docker shows as 500.
func fail(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := errors.AsType[interface {
		error
		GRPCStatus() *status.Status
	}](err); ok {
		return err
	}
	return status.Error(code(err), err.Error())
}

func code(err error) codes.Code {
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return codes.DeadlineExceeded
	case errors.Is(err, context.Canceled):
		return codes.Canceled
	case errors.Is(err, model.ErrNoLeader):
		return codes.Unknown
	}
	switch model.KindOf(err) {
	case model.Invalid:
		return codes.InvalidArgument
	case model.Precondition:
		return codes.FailedPrecondition
	case model.NotFound:
		return codes.NotFound
	case model.Exists:
		return codes.AlreadyExists
	case model.Denied:
		return codes.PermissionDenied
	case model.Exhausted:
		return codes.ResourceExhausted
	case model.Unavailable:
		return codes.Unavailable
	case model.Unimplemented:
		return codes.Unimplemented
	case model.Conflict, model.Internal:
		return codes.Unknown
	default:
		return codes.Unknown
	}
}
