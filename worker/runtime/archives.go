package runtime

import (
	"context"
	"io"

	"github.com/moby/moby/api/types/container"
)

// Archives copies files out of containers and into them, running or not. A runtime need
// not have it. Paths are absolute in the container; symbolic links never lead out of it.
type Archives interface {
	// StatPath describes what is at a path, without following a last symbolic link
	// unless the path ends in a slash or a dot. NotFound when nothing is there.
	StatPath(ctx context.Context, id, path string) (*container.PathStat, error)
	// CopyFrom writes a tar archive of what is at a path to what begin returns, once
	// it is known that it can be read.
	CopyFrom(ctx context.Context, id, path string, begin func(*container.PathStat) io.Writer) error
	// CopyTo unpacks a tar archive, compressed or not, into a directory that exists.
	CopyTo(ctx context.Context, id, path string, archive io.Reader, opts CopyOptions) error
	// Export writes the root file system as a tar archive, without mounts.
	Export(ctx context.Context, id string, w io.Writer) error
	// Changes lists what differs from the image.
	Changes(ctx context.Context, id string) ([]container.FilesystemChange, error)
}

// CopyOptions says how to unpack.
type CopyOptions struct {
	// KeepKind refuses to replace a directory by something else and the reverse.
	KeepKind bool
	// OwnByUser gives everything to the container's user instead of the archive's.
	OwnByUser bool
}
