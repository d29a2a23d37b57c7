package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"google.golang.org/grpc"

	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/platform/disk"
	"github.com/skep-dev/skep/platform/wire"
)

const (
	// managedFile is there once a node has been a manager: others may know it as one.
	managedFile = "was-manager"
	// lostAfter is how many attempts to have a session in a row make a node look for managers
	// that it does not know.
	lostAfter = 3
	// findManagersPause is how often at most it does that.
	findManagersPause = 5 * time.Second
	// directoryTimeout bounds the answer of one node.
	directoryTimeout = 3 * time.Second
)

// directory answers where the managers are.
type directory struct {
	skepv1.UnimplementedDirectoryServer

	managers func() []remote
}

// Managers implements skepv1.DirectoryServer.
func (d directory) Managers(context.Context, *skepv1.ManagersRequest) (*skepv1.ManagersResponse, error) {
	resp := new(skepv1.ManagersResponse)
	for _, k := range d.managers() {
		resp.Managers = append(resp.Managers, &skepv1.KnownManager{NodeId: k.NodeID, Addr: k.Addr})
	}
	return resp, nil
}

// noteManaged remembers for good that this node was a manager.
func (m *member) noteManaged() {
	if err := disk.WriteFile(filepath.Join(m.dir, managedFile), nil, 0o600); err != nil {
		m.cfg.Log.Warn("not noted that this node was a manager", slog.Any("error", err))
	}
}

// beWorker returns when the role may have changed. Where this node was a manager before, it
// tells nodes which still believe that where the managers are: they may know nobody else.
func (m *member) beWorker(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if _, err := os.Stat(filepath.Join(m.dir, managedFile)); errors.Is(err, fs.ErrNotExist) {
		m.waitRole(ctx, nil)
		return
	}
	listen, err := wire.Listen(ctx, m.cfg.Network, m.saved.ListenAddr)
	if err != nil {
		m.cfg.Log.Warn("nodes that know this one as a manager will not hear where the managers are", slog.Any("error", err))
		m.waitRole(ctx, nil)
		return
	}
	server := wire.NewServer(&wire.Guard{
		Credentials: m.creds, Removed: func(string) bool { return false }, Leading: func() bool { return false }, Refused: m.recordRefusal,
	})
	skepv1.RegisterDirectoryServer(server, directory{managers: m.remotes.list})
	served := make(chan error, 1)
	go func() { served <- server.Serve(listen) }()
	m.waitRole(ctx, nil)
	server.Stop()
	if err := <-served; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		m.cfg.Log.Warn("stopped to tell nodes where the managers are", slog.Any("error", err))
	}
}

// attempt notes that this node tries to reach a manager. It may be lost, when it tried often.
func (m *member) attempt() {
	if m.attempts.Add(1) < lostAfter {
		return
	}
	select {
	case m.lost <- struct{}{}:
	default:
	}
}

// findManagers asks the nodes that this one knows as managers, whenever it reaches none,
// where the managers are.
func (m *member) findManagers(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-m.lost:
		}
		for _, k := range m.remotes.list() {
			if k.Addr == m.saved.AdvertiseAddr {
				continue
			}
			managers, err := askDirectory(ctx, m.creds, k.Addr)
			if err != nil {
				m.cfg.Log.Debug("a node does not say where the managers are", slog.String("addr", k.Addr), slog.Any("error", err))
				continue
			}
			if m.remotes.suggest(managers, m.saved.AdvertiseAddr) {
				m.astray.Store(true)
				m.cfg.Log.Info("a node that was a manager says where the managers are", slog.String("addr", k.Addr), slog.Int("managers", len(managers)))
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(findManagersPause):
		}
	}
}

// askDirectory asks a worker where the managers are.
func askDirectory(ctx context.Context, creds *wire.Credentials, addr string) ([]remote, error) {
	conn, err := wire.Dial(creds, addr, pki.WorkerRole)
	if err != nil {
		return nil, err
	}
	defer conn.Close() //nolint:errcheck // nothing is lost
	ctx, cancel := context.WithTimeout(ctx, directoryTimeout)
	defer cancel()
	resp, err := skepv1.NewDirectoryClient(conn).Managers(ctx, new(skepv1.ManagersRequest))
	if err != nil {
		return nil, fmt.Errorf("ask where the managers are: %w", err)
	}
	var managers []remote
	for _, k := range resp.GetManagers() {
		managers = append(managers, remote{NodeID: k.GetNodeId(), Addr: k.GetAddr()})
	}
	return managers, nil
}
