package ops

import (
	"regexp"

	"github.com/skep-dev/skep/api"
)

const (
	maxName        = 63
	maxPayloadName = 64
)

var (
	nameForm        = regexp.MustCompile(`^[a-zA-Z0-9](?:[-_]*[A-Za-z0-9]+)*$`)
	payloadNameForm = regexp.MustCompile(`^[a-zA-Z0-9]+(?:[a-zA-Z0-9-_.]*[a-zA-Z0-9])?$`)
)

// validName checks the name of a service, network or volume: one DNS label.
func validName(a *api.Annotations) error {
	name := a.GetName()
	switch {
	case name == "":
		return invalid("meta: name must be provided")
	case !nameForm.MatchString(name):
		return invalid("name must be valid as a DNS name component")
	case len(name) > maxName:
		return invalid("name must be 63 characters or fewer")
	default:
		return nil
	}
}

// validPayloadName checks the name of a secret or config.
func validPayloadName(a *api.Annotations) error {
	name := a.GetName()
	switch {
	case name == "":
		return invalid("name must be provided")
	case len(name) > maxPayloadName || !payloadNameForm.MatchString(name):
		return invalid("invalid name, only 64 [a-zA-Z0-9-_.] characters allowed, and the start and end character must be [a-zA-Z0-9]")
	default:
		return nil
	}
}
