// Package replica owns the swarm's state on one manager: it drives raft (the log,
// snapshots, peers, membership), applies committed entries to core/store and
// publishes each version to followers.
//
// One goroutine, Run, owns raft and the current state. Readers take immutable
// snapshots; writers hand a function to Update, which runs on the leader against the
// newest state including proposals in flight, so that proposals are pipelined and no
// lock is held across consensus. What to write is for others to decide.
package replica
