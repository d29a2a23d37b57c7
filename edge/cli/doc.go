// Package cli is what a person types: the commands of the skep program. It talks to a
// daemon through the Docker Engine API and Skep's own endpoints below /skep/v1, starts
// and stops daemons, and turns compose files into services.
//
// A command keeps no state beyond its run and works on its caller's goroutine. What the
// commands need of the process (streams, environment, signals, the daemon itself) they
// get in Env; deciding, storing and running are the daemon's business.
package cli
