package wire

import (
	"context"
	"errors"
	"io"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
)

// newMessage makes an empty message of a linked-in type.
func newMessage(desc protoreflect.MessageDescriptor) (proto.Message, error) {
	t, err := protoregistry.GlobalTypes.FindMessageByName(desc.FullName())
	if err != nil {
		return nil, err
	}
	return t.New().Interface(), nil
}

func forwardUnary(ctx context.Context, conn grpc.ClientConnInterface, name string, m method, req any) (resp any, unsent bool, err error) {
	out, err := newMessage(m.desc.Output())
	if err != nil {
		return nil, false, ToStatus(err)
	}
	if unsent, err := invoke(ctx, conn, name, req, out); err != nil {
		return nil, unsent, err
	}
	return out, false, nil
}

// forwardStream copies messages both ways until the leader has answered.
func forwardStream(ctx context.Context, conn grpc.ClientConnInterface, info *grpc.StreamServerInfo, m method, down grpc.ServerStream) (unsent bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	up, unsent, err := open(ctx, conn, &grpc.StreamDesc{
		StreamName: string(m.desc.Name()), ServerStreams: info.IsServerStream, ClientStreams: info.IsClientStream,
	}, info.FullMethod)
	if err != nil {
		return unsent, err
	}
	return false, copyBoth(up, down, m, info.IsClientStream)
}

func copyBoth(up grpc.ClientStream, down grpc.ServerStream, m method, many bool) error {
	sent := make(chan error, 1)
	go func() { sent <- copyUp(up, down, m, many) }()
	err := copyDown(up, down, m)
	if err == nil {
		return nil
	}
	select {
	case upErr := <-sent:
		if upErr != nil {
			return upErr
		}
	default:
	}
	return err
}

func copyUp(up grpc.ClientStream, down grpc.ServerStream, m method, many bool) error {
	for {
		msg, err := newMessage(m.desc.Input())
		if err != nil {
			return err
		}
		switch err := down.RecvMsg(msg); {
		case errors.Is(err, io.EOF):
			return up.CloseSend()
		case err != nil:
			return err
		}
		if err := up.SendMsg(msg); err != nil {
			return nil //nolint:nilerr // the reason arrives on the way down
		}
		if !many {
			return up.CloseSend()
		}
	}
}

func copyDown(up grpc.ClientStream, down grpc.ServerStream, m method) error {
	for {
		msg, err := newMessage(m.desc.Output())
		if err != nil {
			return err
		}
		switch err := up.RecvMsg(msg); {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
		if err := down.SendMsg(msg); err != nil {
			return err
		}
	}
}
