// Package ops holds the use cases of a swarm: what people and tools ask of a leader
// about nodes, services, tasks, networks, secrets, configs and the cluster itself.
// Each is validated, then one transaction on the replicated state. Every API calls
// these, on the leader.
//
// An Ops has no state of its own and may be used from any goroutine: reads see one
// snapshot, which has all that any manager acknowledged before them, and writes are
// serialized by the State. Errors carry gRPC statuses with the
// texts that Docker's users know. Who may call is platform/wire's business; what
// follows from a change is the deciders'.
package ops
