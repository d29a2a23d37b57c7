// Package wire is how nodes talk: gRPC over mutual TLS with the swarm's own roots,
// authorization of every call by the rule its .proto declares, the caller's identity
// across a forwarding manager, and errors that keep their kind.
//
// Credentials may be replaced while connections use them. Everything may be used from any
// goroutine. Who gets which certificate is for control/ca and platform/enroll.
package wire
