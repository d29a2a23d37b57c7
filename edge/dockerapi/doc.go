// Package dockerapi serves the Docker Engine HTTP API: the endpoints of the swarm
// (swarm, nodes, services, tasks, secrets, configs, their logs), of networks, and of
// the daemon (info, version, events), and Skep's own under /skep/v1. It decodes,
// converts (package convert), calls the leader through the node, and encodes.
//
// The package owns no state: every request reads the leader's or, for events, this
// manager's copy. An API may be used from any goroutine; Register only before it
// serves. Containers, images and volumes of this node are package local's; HTTP
// itself is package httpapi's; what is allowed is control/ops'.
package dockerapi
