// Package runtime runs containers on one machine. It defines what the agent and
// the Docker API need of a container runtime, in Docker's vocabulary (the types of
// github.com/moby/moby/api), and leaves how to its implementations: containerd
// (package containerd) and a fake for tests (package fake). One conformance suite
// holds both.
//
// Every method may be called from any goroutine. Errors carry a model.Kind:
// NotFound, Exists, Conflict (wrong state: "container X is not running"), Invalid,
// Unavailable, Internal; texts are those that Docker users know.
package runtime

import (
	"context"
	"io"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/registry"
	"github.com/moby/moby/api/types/volume"
)

// Keys are the node's own keys for what it keeps of the swarm's tasks.
type Keys interface {
	// TaskKeys returns the key to seal with and behind it others that records may be sealed
	// with.
	TaskKeys() ([][]byte, error)
}

// A Sealer keeps the records of the containers of tasks sealed on disk, because what they
// are made of belongs to the swarm.
type Sealer interface {
	// Unseal gives the keys, which are asked again whenever a record is written. Until then
	// containers of tasks run on, without names and labels, and cannot be started. When it
	// returns without an error, all records that can be opened are sealed with the first
	// key.
	Unseal(ctx context.Context, keys Keys) error
}

// CreateOptions describes a container to create.
type CreateOptions struct {
	// Name without leading slash; empty lets the runtime choose one.
	Name string
	// Config and HostConfig are not changed and must not be changed afterwards.
	Config     *container.Config
	HostConfig *container.HostConfig
	// Networking may be nil. HostConfig.NetworkMode decides about the sandbox:
	// "bridge" or empty, "host", "none".
	Networking *network.NetworkingConfig
	// Files appear inside the container on a tmpfs of its own, never on disk.
	Files []File
}

// File is a secret or config made visible to one container.
type File struct {
	// Path inside the container: absolute, or relative to /run/secrets.
	Path string
	UID  int
	GID  int
	// Mode holds Unix permission bits.
	Mode uint32
	Data []byte
}

// Containers creates containers and steps them through their lives.
// An id argument is a full id, a name (with or without slash) or a unique id prefix.
type Containers interface {
	// Create prepares a container from an image that is present and returns its
	// full id (64 hex digits). NotFound "No such image: X" when it is not.
	Create(ctx context.Context, opts CreateOptions) (id string, warnings []string, err error)
	// Start starts a created or exited container. It returns ErrNotModified when the
	// container runs already.
	Start(ctx context.Context, id string) error
	// Stop asks with the container's stop signal (or signal, if not empty), waits
	// for timeout (nil means the container's own, 10 s by default; negative means
	// for ever) and then kills. ErrNotModified when it does not run.
	Stop(ctx context.Context, id, signal string, timeout *time.Duration) error
	// Kill sends one signal, by name or number.
	Kill(ctx context.Context, id, signal string) error
	// Remove deletes a container, its logs and anonymous volumes if volumes is set.
	Remove(ctx context.Context, id string, force, volumes bool) error
	// Wait returns a channel that yields one result when condition holds.
	Wait(ctx context.Context, id string, condition container.WaitCondition) (<-chan WaitResult, error)
}

// WaitResult is how a container ended.
type WaitResult struct {
	ExitCode int
	// Err is set when the container could not be waited for or never ran.
	Err error
}

// Connector changes the networks of containers, running or not. A network is named by
// its id, its name, or what it was called when the container was created.
type Connector interface {
	// Connect adds a network; "bridge" is the local one. Denied "endpoint with name X already
	// exists in network Y" when the container is on it, or Exists "X is already attached to
	// network Y" for a network of the swarm.
	Connect(ctx context.Context, id string, to OverlayRequest) error
	// Disconnect removes one. Denied when the container is not on it.
	Disconnect(ctx context.Context, id, network string) error
}

// Inspector answers questions about containers.
type Inspector interface {
	// Inspect returns everything known of one container, health included.
	Inspect(ctx context.Context, id string) (*container.InspectResponse, error)
	// List returns all containers, running or not, newest first.
	List(ctx context.Context) ([]*container.InspectResponse, error)
	// Top lists the processes of a running container.
	Top(ctx context.Context, id string, psArgs []string) (*container.TopResponse, error)
	// Stats returns one sample of a running container's resource use; PreCPUStats is empty.
	Stats(ctx context.Context, id string) (*container.StatsResponse, error)
	// Update changes limits of a container, running or not.
	Update(ctx context.Context, id string, update container.UpdateConfig) error
	// Events streams what happens from now on to containers, images and volumes until
	// ctx ends; a subscriber that falls 4096 behind is ended with an error.
	Events(ctx context.Context) (<-chan events.Message, <-chan error)
}

// Streams carries bytes in and out of containers.
type Streams interface {
	// Logs writes a container's log until its end, or until ctx ends with Follow.
	Logs(ctx context.Context, id string, opts LogOptions, write func(LogLine) error) error
	// Attach connects streams to the container's main process until it ends, its
	// output ends or ctx does. It may be called before Start.
	Attach(ctx context.Context, id string, io Stdio) error
	// Resize sets the size of a container's terminal, in characters.
	Resize(ctx context.Context, id string, width, height uint32) error
	// ExecCreate prepares a command in a running container and returns its id.
	ExecCreate(ctx context.Context, id string, config *container.ExecCreateRequest) (execID string, err error)
	// ExecStart runs a prepared command; with a zero Stdio it returns at once (detached),
	// else when the command has ended and its output was written.
	ExecStart(ctx context.Context, execID string, io Stdio) error
	// ExecInspect tells the state of a command.
	ExecInspect(ctx context.Context, execID string) (*container.ExecInspectResponse, error)
}

// ExecResizer sets the size of an exec's terminal.
type ExecResizer interface {
	ExecResize(ctx context.Context, execID string, width, height uint32) error
}

// Pauser freezes and thaws containers.
type Pauser interface {
	Pause(ctx context.Context, id string) error
	Unpause(ctx context.Context, id string) error
	Rename(ctx context.Context, id, name string) error
}

// Stdio is one set of streams. Nil members are not connected.
type Stdio struct {
	Stdin  io.Reader
	Stdout io.Writer
	Stderr io.Writer
	// Logs first replays the log (attach only).
	Logs bool
}

// LogOptions selects lines of a log.
type LogOptions struct {
	Stdout, Stderr bool
	Follow         bool
	// Since and Until bound the lines; zero means unbounded.
	Since, Until time.Time
	// Tail is the number of last lines to begin with, before selecting streams; negative means all.
	Tail int
}

// LogLine is one line as a container wrote it, with its newline if it had one.
type LogLine struct {
	Time time.Time
	// Stderr is false for standard output.
	Stderr bool
	// Partial is set when the line was cut at 16 KiB and goes on in the next.
	Partial bool
	Data    []byte
	// Attrs is what the container's log options ask to have told with each line; usually nil.
	Attrs map[string]string
}

// Images keeps images.
type Images interface {
	// Pull fetches a reference (tag or digest); progress may be nil.
	Pull(ctx context.Context, ref, platform string, auth *registry.AuthConfig, progress func(Progress)) error
	// Load imports a docker-save or OCI archive, compressed or not, and returns the references loaded.
	Load(ctx context.Context, archive io.Reader) (refs []string, err error)
	// Save writes a docker-save archive (with OCI index) of the references.
	Save(ctx context.Context, refs []string, w io.Writer) error
	// InspectImage finds by reference, id or id prefix. NotFound "No such image: X".
	InspectImage(ctx context.Context, ref string) (*image.InspectResponse, error)
	// ListImages lists all images.
	ListImages(ctx context.Context) ([]image.Summary, error)
	// History lists an image's layers.
	History(ctx context.Context, ref string) ([]image.HistoryResponseItem, error)
}

// ImageEditor changes image names and frees space.
type ImageEditor interface {
	Tag(ctx context.Context, source, target string) error
	RemoveImage(ctx context.Context, ref string, force bool) ([]image.DeleteResponse, error)
	PruneImages(ctx context.Context, opts PruneOptions) (deleted []image.DeleteResponse, reclaimed uint64, err error)
	Push(ctx context.Context, ref string, auth *registry.AuthConfig, progress func(Progress)) error
	// Distribution asks the registry for a reference's descriptor and platforms.
	Distribution(ctx context.Context, ref string, auth *registry.AuthConfig) (*registry.DistributionInspect, error)
}

// PruneOptions selects what a prune removes.
type PruneOptions struct {
	// All also removes what has a name but no user.
	All bool
	// Until keeps what is younger; zero keeps nothing.
	Until time.Time
	// Labels are "key" or "key=value"; NotLabels keep what they match.
	Labels, NotLabels []string
}

// Progress is one line of a transfer's progress, as Docker clients show it.
type Progress struct {
	// ID is a short layer id; empty for lines about the whole.
	ID             string
	Status         string
	Current, Total int64
	// Aux is JSON for the last line of a push.
	Aux any
}

// Volumes keeps local volumes, directories under the data root.
type Volumes interface {
	CreateVolume(ctx context.Context, opts volume.CreateRequest) (*volume.Volume, error)
	// InspectVolume: NotFound "get X: no such volume".
	InspectVolume(ctx context.Context, name string) (*volume.Volume, error)
	ListVolumes(ctx context.Context) ([]*volume.Volume, error)
	// RemoveVolume: Conflict "remove X: volume is in use - [ids]".
	RemoveVolume(ctx context.Context, name string, force bool) error
	// PruneVolumes removes unused volumes, only anonymous ones unless opts.All.
	PruneVolumes(ctx context.Context, opts PruneOptions) (names []string, reclaimed uint64, err error)
	// VolumeUsage returns bytes used and the number of containers using a volume.
	VolumeUsage(ctx context.Context, name string) (bytes int64, users int, err error)
}

// Info describes the runtime for `docker info`, `docker version` and the node description.
type Info struct {
	ContainerdVersion string
	RuntimeName       string // runc or crun
	RuntimeVersion    string
	StorageDriver     string
	CgroupVersion     string // "1" or "2"
	CgroupDriver      string
	NCPU              int
	MemTotal          int64
	Architecture      string // as uname prints it, x86_64
	KernelVersion     string
	OperatingSystem   string
	Warnings          []string
}

// Engine is everything a runtime does. Consumers declare the part they use.
type Engine interface { //nolint:interfacebloat // the sum of the parts below, for who implements all of them
	Containers
	Connector
	Inspector
	Streams
	ExecResizer
	Pauser
	Images
	ImageEditor
	Volumes
	Info(ctx context.Context) (Info, error)
	// Run supervises the runtime (its containerd, health checks, log rotation, exit
	// events) until ctx ends. Containers outlive it.
	Run(ctx context.Context) error
}
