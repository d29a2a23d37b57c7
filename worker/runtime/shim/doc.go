// Package shim is Skep's containerd shim: containerd's own runc task service with four
// things added. Tasks are grouped: one shim process serves a sandbox and all containers
// that were put into it. Output goes through the shim into bounded JSON log files
// (package jsonlog), and to whoever is attached over the group's stream socket, so that
// neither containerd nor the daemon is on its way. The exit status of every container is
// written to a file before anybody is told. And a stopped task stays known to a
// restarted containerd until it is deleted.
//
// The shim owns log files and exit files while a task exists; the daemon only reads them.
// A task's output URI (type Spec) says where things are. The service may be called from
// any goroutine.
package shim
