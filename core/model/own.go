package model

import "strings"

// ownPrefix begins the names of the kinds and resources that Skep keeps its own state in.
const ownPrefix = "skep."

// IsOwn reports whether a name of a kind or of a resource is Skep's own. Names have no case.
func IsOwn(name string) bool {
	return len(name) >= len(ownPrefix) && strings.EqualFold(name[:len(ownPrefix)], ownPrefix)
}
