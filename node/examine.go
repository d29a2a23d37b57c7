package node

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/control/replica"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/core/rescue"
	"github.com/skep-dev/skep/platform/disk"
	"github.com/skep-dev/skep/platform/keystore"
)

// Examine says what a data root holds. It changes nothing, and the daemon of the directory
// may run. unlockKey opens a locked one and may be empty.
func Examine(dataRoot, unlockKey string) (rescue.Facts, error) {
	f := rescue.Facts{Dir: dataRoot}
	var kek []byte
	if unlockKey != "" {
		var err error
		if kek, err = pki.ParseUnlockKey(unlockKey); err != nil {
			return f, err
		}
	}
	if info, err := os.Stat(dataRoot); err != nil {
		return f, fmt.Errorf("look at data root: %w", err)
	} else if !info.IsDir() {
		return f, model.Errorf(model.Invalid, "%s is no directory", dataRoot)
	}
	f.Running = inUse(dataRoot)
	dir := filepath.Join(dataRoot, "swarm")
	saved, ok, err := loadState(dir)
	if err != nil {
		f.Damage = append(f.Damage, err.Error())
	}
	f.Addr = saved.AdvertiseAddr
	keys, err := keystore.Peek(filepath.Join(dir, "certificates"), kek)
	switch {
	case errors.Is(err, keystore.ErrNone):
		if ok && !saved.JoinInProgress {
			f.Damage = append(f.Damage, "the node's certificate is missing")
		}
		return f, nil
	case errors.Is(err, pki.ErrLocked):
		return f, err
	case err != nil:
		f.Damage = append(f.Damage, err.Error())
	}
	f.Locked, f.Opened, f.KEKVersion = keys.Sealed, keys.Opened, keys.KEKVersion
	if err := certificateFacts(&f, keys.ChainPEM); err != nil {
		f.Damage = append(f.Damage, err.Error())
		return f, nil
	}
	f.InSwarm = ok && err == nil
	raft := filepath.Join(dir, "raft")
	if f.Manager && disk.Exists(raft) {
		if err := logFacts(&f, raft, keys); err != nil {
			f.Damage = append(f.Damage, err.Error())
		}
	}
	return f, nil
}

// inUse reports whether a daemon holds the lock of a data root.
func inUse(dataRoot string) bool {
	lock, err := os.Open(filepath.Join(dataRoot, "daemon.lock"))
	if err != nil {
		return false
	}
	defer lock.Close() //nolint:errcheck // only read
	return errors.Is(unix.Flock(int(lock.Fd()), unix.LOCK_SH|unix.LOCK_NB), unix.EWOULDBLOCK)
}

func certificateFacts(f *rescue.Facts, chainPEM []byte) error {
	certs, err := pki.ParseCerts(chainPEM)
	if err != nil {
		return fmt.Errorf("read the node's certificate: %w", err)
	}
	leaf := certs[0].Subject
	f.NodeID, f.NotAfter = leaf.CommonName, certs[0].NotAfter
	if len(leaf.Organization) > 0 {
		f.ClusterID = leaf.Organization[0]
	}
	f.Manager = len(leaf.OrganizationalUnit) > 0 && leaf.OrganizationalUnit[0] == pki.ManagerRole
	return nil
}

// logFacts reads the raft log, as far as the keys open it.
func logFacts(f *rescue.Facts, dir string, keys keystore.Peeked) error {
	p, err := replica.Peek(dir, slog.New(slog.DiscardHandler), keys.DEKs...)
	if err != nil {
		return err
	}
	meta := p.Disk.Snapshot.GetMetadata()
	f.Log = &rescue.Log{
		RaftID: raftID(p.Self), Term: p.Disk.HardState.GetTerm(), Commit: p.Disk.HardState.GetCommit(), Last: p.Disk.Last,
		SnapshotIndex: meta.GetIndex(), SnapshotTerm: meta.GetTerm(), SnapshotTime: p.Disk.SnapshotTime,
		Rotating: keys.Rotating, Voters: len(meta.GetConfState().GetVoters()),
	}
	if p.Disk.Sealed && (!f.Locked || f.Opened) {
		f.Damage = append(f.Damage, "no key of this node opens its log")
	}
	hosts := map[string]string{}
	for _, n := range p.State.GetNodes() {
		hosts[n.GetId()] = n.GetDescription().GetHostname()
	}
	for _, m := range p.Members {
		f.Log.Members = append(f.Log.Members, rescue.Member{RaftID: raftID(m), NodeID: m.GetNodeId(), Hostname: hosts[m.GetNodeId()], Addr: m.GetAddr()})
	}
	if s := p.State; s != nil {
		f.Log.Objects = map[string]int{
			"service": len(s.GetServices()), "task": len(s.GetTasks()), "node": len(s.GetNodes()),
			"network": len(s.GetNetworks()), "secret": len(s.GetSecrets()), "config": len(s.GetConfigs()),
		}
	}
	return nil
}

func raftID(m *api.RaftMember) string { return strconv.FormatUint(m.GetRaftId(), 16) }
