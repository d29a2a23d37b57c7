// Package sim runs whole swarms inside one test process. Every node is the real daemon
// (node.Run: API, membership, raft, controllers, dispatcher, certificates, agent) on a
// container runtime in memory and a network in memory, in a testing/synctest bubble, so
// that a month of a swarm's life takes seconds.
//
// A seed chooses workload and faults: messages lost and late, links cut one way or both,
// daemons killed with kill -9 at any quiet moment, machines rebooted, long sleeps. It
// replays these, not the interleaving of goroutines. Checkers look after every step, and
// once all faults are healed at everything that users were promised. Failures that users
// of swarms reported over the years are scenarios with names.
//
// Everything but the network (package memnet) is in test files; run it with
//
//	go test ./sim       # scenarios, and two short random runs
//	make sim SEED=7     # long, from one seed
//
// A crash keeps what the daemon had written, synced or not, as the death of a process
// does; losing the page cache with the machine is tested at the log itself.
package sim
