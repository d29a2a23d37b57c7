// Package netplan decides what the kernel of one node shall hold so that the swarm's
// networks work there: forwarding to other nodes' endpoints, backends of service
// addresses and published ports, and what each name means.
//
// A State merges the updates that the node receives, and Merge answers with a Plan: the
// ordered, idempotent operations that lead from before to after. Diff compares what is
// wanted with what was observed. The caller owns a State and guards it; nothing here
// blocks, and worker/dataplane does all acting.
package netplan
