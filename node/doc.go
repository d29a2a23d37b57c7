// Package node assembles one process: its identity and membership of a swarm, the
// roles that follow from its certificate, the servers, the agent and the APIs, and their
// orderly start and end.
//
// One goroutine owns the membership (inactive, pending, active, locked, error); requests
// to change it are messages to that goroutine. What the parts do is theirs.
package node
