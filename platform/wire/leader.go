package wire

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/skep-dev/skep/core/model"
)

const (
	// LeaderWait is how long a call waits for a leader that takes it before it fails.
	LeaderWait = 3 * time.Second
	// leaderPoll is the pause before a leader that took no call is asked for again.
	leaderPoll = 50 * time.Millisecond
	// redirected begins the refusal of a call that came to the wrong manager twice.
	redirected = "more than one redirect to leader from: "
)

// callLeader makes a call on the connection that pick returns. A leader that has just died
// is believed in until another is elected, and calls to it fail at once: such a call is
// made again, for LeaderWait at most, on whoever leads by then. Only calls that certainly
// reached nobody are: call reports as unsent those that left this process in no part.
func callLeader(ctx context.Context, pick func(context.Context) (grpc.ClientConnInterface, error), call func(grpc.ClientConnInterface) (unsent bool, err error)) error {
	wait, cancel := context.WithTimeout(ctx, LeaderWait)
	defer cancel()
	for {
		conn, err := pick(wait)
		if err != nil {
			return ToStatus(err)
		}
		unsent, err := call(conn)
		if err == nil || !unsent {
			return err
		}
		select {
		case <-wait.Done():
			return err
		case <-time.After(leaderPoll):
		}
	}
}

// invoke makes a unary call and reports whether it certainly was not executed: no
// connection took it, or the manager that got it does not lead and so refused it, or was a
// read that the manager did not answer because it leads no more.
func invoke(ctx context.Context, conn grpc.ClientConnInterface, name string, args, reply any, opts ...grpc.CallOption) (unsent bool, err error) {
	var to peer.Peer // stays empty unless a connection was there to send on
	err = conn.Invoke(ctx, name, args, reply, append(slices.Clip(opts), grpc.Peer(&to))...)
	switch status.Code(err) {
	case codes.Unavailable:
		return to.Addr == nil || unread(err), err
	case codes.ResourceExhausted:
		return strings.HasPrefix(status.Convert(err).Message(), redirected), err
	default:
		return false, err
	}
}

// unread reports whether a call was a read that is to be made again, because the manager that
// got it leads no more.
func unread(err error) bool { return errors.Is(FromStatus(err), model.ErrUnconfirmed) }

// open opens a stream and reports whether no connection took it. A stream that was opened
// is never opened again: what it carried may have been executed.
func open(ctx context.Context, conn grpc.ClientConnInterface, desc *grpc.StreamDesc, name string, opts ...grpc.CallOption) (stream grpc.ClientStream, unsent bool, err error) {
	stream, err = conn.NewStream(ctx, desc, name, opts...)
	return stream, status.Code(err) == codes.Unavailable, err
}
