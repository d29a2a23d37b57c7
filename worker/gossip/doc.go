// Package gossip tells Docker Engines in the swarm of this node's endpoints, in their own way:
// it is a member of their memberlist and keeps core/netdb's replica of their tables.
//
// Gossip.Run owns everything: while somebody is there to hear, it has the port open and makes
// what is published what it was last told (SetSession, SetRows); otherwise it has nothing open
// and does nothing. What Docker's nodes publish can be read (Others), but programs no kernel:
// Skep's nodes hear of all endpoints from their managers. docs/format/gossip.md describes
// the messages, docs/decisions why it is so.
package gossip
