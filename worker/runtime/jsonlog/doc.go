// Package jsonlog writes and reads container logs: one file per container in Docker's
// json-file format, a JSON object a line with the members log, stream and time, bounded
// by rotation (path, path.1, path.2 …, youngest first). The Writer runs in the shim,
// one to a container, so that a log goes on while the daemon is away; the Reader runs in the
// daemon and needs nothing but the files. A Writer belongs to one goroutine at a time
// (it locks, since standard output and error come from two); a Reader to one.
package jsonlog
