package httpapi

import (
	"errors"
	"fmt"
	"net/http"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime"
)

// Error is an error with a status of its own, for what model.Kind does not tell apart.
type Error struct {
	Status int
	Text   string
}

// Error returns the text.
func (e *Error) Error() string { return e.Text }

// Errorf makes an Error.
func Errorf(status int, format string, args ...any) error {
	return &Error{Status: status, Text: fmt.Sprintf(format, args...)}
}

// StatusOf returns the HTTP status of an error: that of an *Error, of an error with a
// gRPC status (whose text keeps its "rpc error: code = X desc = " as Docker's does),
// or of a model.Kind. Everything else is 500.
func StatusOf(err error) int {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Status
	}
	if errors.Is(err, runtime.ErrNotModified) {
		return http.StatusNotModified
	}
	if tooLarge, ok := errors.AsType[*http.MaxBytesError](err); ok && tooLarge != nil {
		return http.StatusRequestEntityTooLarge
	}
	var withStatus interface{ GRPCStatus() *status.Status }
	if errors.As(err, &withStatus) {
		return statusOfCode(withStatus.GRPCStatus().Code())
	}
	return statusOfKind(model.KindOf(err))
}

func statusOfCode(code codes.Code) int {
	switch code {
	case codes.OK:
		return http.StatusOK
	case codes.InvalidArgument, codes.FailedPrecondition, codes.OutOfRange:
		return http.StatusBadRequest
	case codes.Unauthenticated:
		return http.StatusUnauthorized
	case codes.PermissionDenied:
		return http.StatusForbidden
	case codes.NotFound:
		return http.StatusNotFound
	case codes.AlreadyExists:
		return http.StatusConflict
	case codes.Unimplemented:
		return http.StatusNotImplemented
	case codes.Unavailable:
		return http.StatusServiceUnavailable
	case codes.Canceled, codes.Unknown, codes.DeadlineExceeded, codes.ResourceExhausted,
		codes.Aborted, codes.Internal, codes.DataLoss:
		return http.StatusInternalServerError
	default:
		return http.StatusInternalServerError
	}
}

func statusOfKind(kind model.Kind) int {
	switch kind {
	case model.Invalid, model.Precondition:
		return http.StatusBadRequest
	case model.NotFound:
		return http.StatusNotFound
	case model.Exists, model.Conflict:
		return http.StatusConflict
	case model.Denied:
		return http.StatusForbidden
	case model.Unavailable:
		return http.StatusServiceUnavailable
	case model.Unimplemented:
		return http.StatusNotImplemented
	case model.Internal, model.Exhausted:
		return http.StatusInternalServerError
	default:
		return http.StatusInternalServerError
	}
}
