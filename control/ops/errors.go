package ops

import "github.com/skep-dev/skep/platform/wire"

// fail gives an error the gRPC status that SwarmKit's clients expect.
func fail(err error) error { return wire.ToStatus(err) }
