package rescue

import "time"

// Facts is what a data root says about the node that it belongs to.
type Facts struct {
	Dir string `json:"dir"`
	// Running says that a daemon uses the directory.
	Running bool `json:"running"`
	// InSwarm says that the node is in a swarm; what follows is empty otherwise.
	InSwarm   bool   `json:"in_swarm"`
	NodeID    string `json:"node_id,omitempty"`
	ClusterID string `json:"cluster_id,omitempty"`
	// Manager is the role that the certificate gives.
	Manager bool `json:"manager"`
	// Addr is what the node tells others to reach it at.
	Addr string `json:"addr,omitempty"`
	// NotAfter is when the node's certificate expires.
	NotAfter time.Time `json:"certificate_expires,omitzero"`
	// Locked says that the key file is sealed, Opened that the unlock key given opens it.
	Locked     bool   `json:"locked"`
	Opened     bool   `json:"opened"`
	KEKVersion uint64 `json:"kek_version,omitempty"`
	// Log is what a manager has; nil without one.
	Log *Log `json:"log,omitempty"`
	// Damage is what cannot be read, and why.
	Damage []string `json:"damage,omitempty"`
}

// Log is the raft log of a manager.
type Log struct {
	RaftID string `json:"raft_id"`
	// Term, Commit and Last are where the log stands.
	Term   uint64 `json:"term"`
	Commit uint64 `json:"commit"`
	Last   uint64 `json:"last"`
	// The newest snapshot; zero without one.
	SnapshotIndex uint64    `json:"snapshot_index,omitempty"`
	SnapshotTerm  uint64    `json:"snapshot_term,omitempty"`
	SnapshotTime  time.Time `json:"snapshot_time,omitzero"`
	// Rotating says that the log moves to another key.
	Rotating bool `json:"rotating,omitempty"`
	// Voters counts the members of the newest snapshot, which is readable without a key.
	Voters int `json:"voters,omitempty"`
	// Members and Objects are known only of a log that can be opened. Objects counts the
	// newest snapshot's, by kind.
	Members []Member       `json:"members,omitempty"`
	Objects map[string]int `json:"objects,omitempty"`
}

// Member is one manager.
type Member struct {
	RaftID   string `json:"raft_id"`
	NodeID   string `json:"node_id"`
	Hostname string `json:"hostname,omitempty"`
	Addr     string `json:"addr"`
}

// Managers returns how many managers the swarm has as far as is known, 0 if it is not.
func (l *Log) Managers() int {
	if n := len(l.Members); n > 0 {
		return n
	}
	return l.Voters
}
