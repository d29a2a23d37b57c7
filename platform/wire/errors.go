package wire

import (
	"context"
	"errors"
	"io"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/skep-dev/skep/core/model"
)

// codeOf is the one table between kinds and gRPC codes. Docker's clients look for
// "update out of sequence" and the lost leader under Unknown, as SwarmKit sends them.
func codeOf(kind model.Kind) codes.Code {
	switch kind {
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

// ToStatus turns an error into one that gRPC carries. Errors that carry a status already
// stay as they are; nil stays nil.
func ToStatus(err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return err
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	switch {
	case errors.Is(err, model.ErrNoLeader):
		return status.Error(codes.Unknown, model.ErrNoLeader.Text)
	case errors.Is(err, model.ErrSequence):
		return status.Error(codes.Unknown, model.ErrSequence.Text)
	case errors.Is(err, context.Canceled):
		return status.Error(codes.Canceled, err.Error())
	case errors.Is(err, context.DeadlineExceeded):
		return status.Error(codes.DeadlineExceeded, err.Error())
	default:
		return status.Error(codeOf(model.KindOf(err)), err.Error())
	}
}

// FromStatus turns an error that came over gRPC into one with a kind and the same text.
func FromStatus(err error) error {
	s, ok := status.FromError(err)
	if err == nil || !ok {
		return err
	}
	switch {
	case s.Message() == model.ErrNoLeader.Text:
		return model.ErrNoLeader
	case s.Message() == model.ErrSequence.Text:
		return model.ErrSequence
	}
	for kind := model.Internal; kind <= model.Unimplemented; kind++ {
		if kind != model.Internal && kind != model.Conflict && codeOf(kind) == s.Code() {
			return &model.Error{Kind: kind, Text: s.Message()}
		}
	}
	return &model.Error{Kind: model.Internal, Text: s.Message()}
}
