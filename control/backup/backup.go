package backup

import (
	"bytes"
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
)

// magic begins a backup, so that a reader can tell it from another file.
const magic = "skep backup\n"

const format = 1

// Info says where a backup comes from.
type Info struct {
	ClusterID string
	// NodeID is the manager that wrote it.
	NodeID string
	// Index is the place in the log that the state is of.
	Index     uint64
	CreatedAt time.Time
	// Version is that of the program that wrote it.
	Version string
}

// Encode returns a backup of a state.
func Encode(info Info, state *api.Snapshot) ([]byte, error) {
	snapshot, err := proto.Marshal(state)
	if err != nil {
		return nil, fmt.Errorf("encode backup: %w", err)
	}
	data, err := proto.MarshalOptions{}.MarshalAppend([]byte(magic), &skepv1.Backup{
		Format: format, ClusterId: info.ClusterID, NodeId: info.NodeID, Index: info.Index,
		CreatedAt: timestamppb.New(info.CreatedAt), Version: info.Version, Snapshot: snapshot,
	})
	if err != nil {
		return nil, fmt.Errorf("encode backup: %w", err)
	}
	return data, nil
}

// Parse reads what Encode wrote. The state has exactly one cluster, of the id that Info
// says.
func Parse(data []byte) (Info, *api.Snapshot, error) {
	rest, ok := bytes.CutPrefix(data, []byte(magic))
	if !ok {
		return Info{}, nil, model.Errorf(model.Invalid, "this is not a backup of a swarm")
	}
	b := new(skepv1.Backup)
	if err := proto.Unmarshal(rest, b); err != nil {
		return Info{}, nil, model.Errorf(model.Invalid, "this backup is damaged: %v", err)
	}
	if b.GetFormat() != format {
		return Info{}, nil, model.Errorf(model.Invalid, "this backup has format %d, which this version of Skep does not know: use the one that wrote it, %s", b.GetFormat(), b.GetVersion())
	}
	state := new(api.Snapshot)
	if err := proto.Unmarshal(b.GetSnapshot(), state); err != nil {
		return Info{}, nil, model.Errorf(model.Invalid, "this backup is damaged: %v", err)
	}
	clusters := state.GetStore().GetClusters()
	if len(clusters) != 1 || clusters[0].GetId() == "" || clusters[0].GetId() != b.GetClusterId() || b.GetIndex() == 0 {
		return Info{}, nil, model.Errorf(model.Invalid, "this backup is damaged: it holds %d clusters", len(clusters))
	}
	return Info{
		ClusterID: b.GetClusterId(), NodeID: b.GetNodeId(), Index: b.GetIndex(), CreatedAt: b.GetCreatedAt().AsTime(), Version: b.GetVersion(),
	}, state, nil
}

// Removed counts what Adapt took out of a state.
type Removed struct{ Managers, Workers, Tasks int }

// Adapt changes a state to that of a swarm whose managers are all gone: they are removed
// and their certificates blacklisted, for a machine that comes back with the old log must
// not be believed. With alone the workers are removed likewise. What ran on removed nodes is
// orphaned, so that the swarm replaces it.
func Adapt(state *api.Snapshot, alone bool, now time.Time) Removed {
	var removed Removed
	s := state.GetStore()
	cluster := s.GetClusters()[0]
	if cluster.BlacklistedCertificates == nil {
		cluster.BlacklistedCertificates = map[string]*api.BlacklistedCertificate{}
	}
	gone := map[string]bool{}
	var kept []*api.Node
	for _, n := range s.GetNodes() {
		manager := n.GetRole() == api.NodeRole_MANAGER || n.GetSpec().GetDesiredRole() == api.NodeRole_MANAGER
		switch {
		case manager:
			removed.Managers++
		case alone:
			removed.Workers++
		default:
			kept = append(kept, n)
			continue
		}
		gone[n.GetId()] = true
		cluster.BlacklistedCertificates[n.GetId()] = pki.Blacklisted(n)
	}
	s.Nodes = kept
	for _, t := range s.GetTasks() {
		if gone[t.GetNodeId()] && t.GetStatus().GetState() < api.TaskState_COMPLETE {
			removed.Tasks++
			t.Status = &api.TaskStatus{
				Timestamp: timestamppb.New(now), AppliedAt: timestamppb.New(now), State: api.TaskState_ORPHANED,
				Message:       "Task belonged to a node that is not in the restored swarm",
				RuntimeStatus: t.GetStatus().GetRuntimeStatus(), PortStatus: t.GetStatus().GetPortStatus(),
			}
		}
	}
	return removed
}
