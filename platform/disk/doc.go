// Package disk keeps what a manager must not lose: sealed records, the write-ahead log
// of raft with its snapshots, in the layout that SwarmKit's managers use.
//
// A Log belongs to one goroutine, but for SaveSnapshotFile and Purge, which may run
// beside it in another. Seal and Open are functions of their arguments. Which keys there
// are and when they change is for the caller (control/replica) to say.
package disk
