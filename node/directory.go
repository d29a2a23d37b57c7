package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/platform/disk"
	"github.com/skep-dev/skep/platform/wire"
)

const (
	// managedFile is there once a node has been a manager: others may know it as one.
	managedFile = "was-manager"
	// listenAgainAfter is the pause of a demoted node whose port is taken.
	listenAgainAfter = 10 * time.Second

	// lostAfter is how many attempts to have a session in a row make a node look for managers
	// that it does not know.
	lostAfter = 3
	// A lost node asks at a random time within a pause, which doubles each time: managers
	// without a quorum make all nodes lost at once.
	firstFindPause = 5 * time.Second
	maxFindPause   = time.Minute
	// skipManager is for how long a node that answered as a manager is not asked.
	skipManager = 5 * time.Minute
	// directoryTimeout and directorySize bound the answer of one node.
	directoryTimeout = 3 * time.Second
	directorySize    = 16 << 10
)

// errManages means that somebody who was asked where the managers are is one.
var errManages = errors.New("it is a manager")

// directory answers where the managers are.
type directory struct {
	skepv1.UnimplementedDirectoryServer

	managers func() []remote
}

// Managers implements skepv1.DirectoryServer.
func (d directory) Managers(context.Context, *skepv1.ManagersRequest) (*skepv1.ManagersResponse, error) {
	resp := new(skepv1.ManagersResponse)
	for _, k := range d.managers() {
		resp.Addrs = append(resp.Addrs, k.Addr)
	}
	return resp, nil
}

// rootOnly serves the root certificate, of a certificate authority's calls.
type rootOnly struct {
	api.UnimplementedCAServer

	creds *wire.Credentials
}

// GetRootCACertificate implements api.CAServer.
func (r rootOnly) GetRootCACertificate(context.Context, *api.GetRootCACertificateRequest) (*api.GetRootCACertificateResponse, error) {
	return &api.GetRootCACertificateResponse{Certificate: r.creds.Current().Root.CertPEM}, nil
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
	if _, err := os.Stat(filepath.Join(m.dir, managedFile)); errors.Is(err, fs.ErrNotExist) {
		m.waitRole(ctx, nil)
		return
	}
	for warned := false; ; {
		err := m.serveDirectory(ctx)
		if err == nil {
			return
		}
		if !warned {
			m.cfg.Log.Warn("nodes that know this one as a manager will not hear where the managers are until its port can be had",
				slog.String("addr", m.saved.ListenAddr), slog.Any("error", err))
			warned = true
		}
		select {
		case <-ctx.Done():
			return
		case <-m.role:
			return
		case <-time.After(listenAgainAfter):
		}
	}
}

// serveDirectory answers at the swarm port until the role may have changed or ctx ends; an
// error means that it cannot. The port is free again when it returns.
func (m *member) serveDirectory(ctx context.Context) error {
	listen, err := wire.Listen(ctx, m.cfg.Network, m.saved.ListenAddr)
	if err != nil {
		return err
	}
	// Who was removed is not known here, and nothing is passed on to the leader.
	server := wire.NewServer(&wire.Guard{
		Credentials: m.creds, Removed: func(string) bool { return false }, Leading: func() bool { return true }, Refused: m.recordRefusal,
	})
	skepv1.RegisterDirectoryServer(server, directory{managers: m.remotes.list})
	// A node that was away when the root was replaced believes nobody's certificate before.
	api.RegisterCAServer(server, rootOnly{creds: m.creds})
	served := make(chan error, 1)
	go func() { served <- server.Serve(listen) }()
	select {
	case err := <-served:
		server.Stop()
		return err
	case <-m.role:
	case <-ctx.Done():
	}
	server.Stop()
	if err := <-served; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		m.cfg.Log.Warn("stopped to tell nodes where the managers are", slog.Any("error", err))
	}
	return nil
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

// isLost reports whether this node tried often to have a session, in vain.
func (m *member) isLost() bool { return m.attempts.Load() >= lostAfter }

// findManagers asks the nodes that this one knows as managers, while it reaches none, where
// the managers are.
func (m *member) findManagers(ctx context.Context) {
	skip := map[string]time.Time{} // until when somebody is not asked, by address
	for pause := firstFindPause; ; pause = min(2*pause, maxFindPause) {
		select {
		case <-ctx.Done():
			return
		case <-m.lost:
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(rand.N(pause)):
		}
		if !m.isLost() {
			pause = firstFindPause / 2 // doubled for the next time
			continue
		}
		m.askManagers(ctx, skip)
	}
}

// askManagers asks all those at once that the last session listed, but for whom skip names for
// now; it adds those who answer as managers.
func (m *member) askManagers(ctx context.Context, skip map[string]time.Time) {
	now := time.Now()
	asked := slices.DeleteFunc(m.remotes.list(), func(k remote) bool {
		return k.Addr == m.saved.AdvertiseAddr || now.Before(skip[k.Addr])
	})
	manages := make([]bool, len(asked))
	var group sync.WaitGroup
	for i, k := range asked {
		group.Go(func() {
			addrs, err := askDirectory(ctx, m.creds, k.Addr)
			switch {
			case errors.Is(err, errManages):
				manages[i] = true
			case err != nil:
				m.cfg.Log.Debug("a node does not say where the managers are", slog.String("addr", k.Addr), slog.Any("error", err))
			case m.remotes.suggest(k.Addr, addrs, m.saved.AdvertiseAddr):
				m.cfg.Log.Info("a node that was a manager says where the managers are", slog.String("addr", k.Addr), slog.Int("managers", len(addrs)))
			}
		})
	}
	group.Wait()
	for i, k := range asked {
		if manages[i] {
			skip[k.Addr] = now.Add(skipManager)
		}
	}
}

// askDirectory asks a node of the swarm where the managers are. It fails with errManages if
// that node is one itself.
func askDirectory(ctx context.Context, creds *wire.Credentials, addr string) ([]string, error) {
	conn, err := wire.Dial(creds, addr, wire.AnyRole)
	if err != nil {
		return nil, err
	}
	defer conn.Close() //nolint:errcheck // nothing is lost
	ctx, cancel := context.WithTimeout(ctx, directoryTimeout)
	defer cancel()
	resp, err := skepv1.NewDirectoryClient(conn).Managers(ctx, new(skepv1.ManagersRequest), grpc.MaxCallRecvMsgSize(directorySize))
	if status.Code(err) == codes.Unimplemented {
		return nil, errManages // workers serve it or do not listen
	}
	if err != nil {
		return nil, fmt.Errorf("ask where the managers are: %w", err)
	}
	return resp.GetAddrs(), nil
}
