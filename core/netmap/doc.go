// Package netmap decides which node must know what of the swarm's networks: which
// endpoints, behind which service addresses and published ports, on which nodes.
//
// A Map follows the stored records and says, for every change, who must hear of which
// records; what they then hear is an increment made for one node. It belongs to one owner,
// is rebuilt from the store by a new leader, and the cost of a change grows with the nodes
// that take part in the network concerned, not with the swarm. Carrying the increments to
// nodes is control/dispatcher's, addresses are core/alloc's, and what a kernel holds is
// core/netplan's.
package netmap
