// Package docker holds Docker's rules that are the same whatever runs the
// containers: names and their resolution, signals, the merge of an image's
// configuration into a container's, validation of requests, event attributes and
// the distribution of events. It does no I/O. Index is guarded by its owner; Bus may
// be used from any goroutine; everything else is functions of their arguments.
package docker
