// Package devnet runs a swarm on one machine for trying things out and for tests: every
// node is a full daemon in a network namespace of its own, with its own address,
// directories, containerd and cgroups, on a bridge that belongs to the swarm alone.
//
// All state is on disk under Config.Dir and in the kernel, guarded by a lock file per
// swarm: any number of processes may call it at the same time. It does not know the
// daemon: it starts a binary, waits until its socket answers, and leaves what the nodes
// say to each other to the function that the caller passes to Up.
package devnet
