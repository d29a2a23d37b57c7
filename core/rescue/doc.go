// Package rescue decides what can be done with a node whose swarm is in trouble: from what
// its data root says, in Facts, it makes advice with the commands to type. It reads no
// disk and owns no state; its functions are pure and may be called from any goroutine.
package rescue
