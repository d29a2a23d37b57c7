// Package containerd runs containers through containerd: its own, which it supervises as
// a child that outlives it, or one that is there already. Images, their content and
// snapshots are containerd's business; the Docker view of a container (configuration,
// state, names, volumes, logs, health, restart policy) is this package's, kept in a bbolt
// file under Root, so that a restarted process finds everything again.
//
// A container is a snapshot and a record. Only while it runs does containerd know a
// container and a task for it, made from the record at start and deleted at exit. Tasks
// are grouped in sandboxes, one shim process to each (package shim).
//
// Engine.mu guards what is in memory and is never held across I/O. Steps of one
// container's life (start, exit, pause, removal) take its turn, so they follow one
// another; stopping only sends signals and waits, and takes none. Networks are the
// runtime.Network's business.
package containerd
