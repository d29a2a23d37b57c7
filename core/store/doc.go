// Package store holds the swarm's state: immutable snapshots of tables with
// indexes, transactions that make the next snapshot, and the conversion from and to
// entries of the raft log and raft snapshots.
//
// A Snapshot never changes and may be read from any goroutine; the records it
// returns belong to it and must not be changed (clone them). A Tx belongs to one
// goroutine. Who owns the current snapshot, and agreement on it, is control/replica's.
package store
