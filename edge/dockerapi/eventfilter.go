package dockerapi

import (
	"mime"
	"slices"
	"strings"

	"github.com/moby/moby/api/types/events"

	"github.com/skep-dev/skep/edge/dockerapi/httpapi"
)

func splitComma(s string) []string { return strings.Split(s, ",") }

// mediaType reads one entry of an Accept header; what cannot be read has no kind.
func mediaType(s string) (string, map[string]string) {
	kind, parameters, err := mime.ParseMediaType(strings.TrimSpace(s))
	if err != nil {
		return "", nil
	}
	return kind, parameters
}

// eventMatches reports whether an event passes all filters.
func eventMatches(f httpapi.Filters, m events.Message, facts Facts) bool {
	if !f.Exact("type", string(m.Type)) || !f.Exact("scope", m.Scope) || !f.Labels("label", m.Actor.Attributes) || !matchAction(f, string(m.Action)) {
		return false
	}
	if f.Has("daemon") && !f.Exact("daemon", facts.ID) && !f.Exact("daemon", facts.Name) {
		return false
	}
	for _, kind := range []string{"container", "plugin", "volume", "network", "node", "service", "secret", "config"} {
		if f.Has(kind) && !matchActor(f, kind, m) {
			return false
		}
	}
	return matchImage(f, m)
}

// matchAction compares actions; those with a text after a colon match by what is before it.
func matchAction(f httpapi.Filters, action string) bool {
	if !f.Has("event") || f.Exact("event", action) {
		return true
	}
	before, _, found := strings.Cut(action, ":")
	return found && slices.Contains([]string{"health_status", "exec_create", "exec_start"}, before) && f.Exact("event", before)
}

// matchActor reports whether an event is about a thing of this kind whose id or name is,
// or begins with, one of the filter's values.
func matchActor(f httpapi.Filters, kind string, m events.Message) bool {
	id, name := m.Actor.ID, m.Actor.Attributes["name"]
	if string(m.Type) != kind {
		// Events of containers on a network, and the like, name the other in an attribute.
		other, ok := m.Actor.Attributes[kind]
		if !ok {
			return false
		}
		id, name = other, other
	}
	return f.Prefix(kind, id) || (name != "" && f.Prefix(kind, name))
}

func matchImage(f httpapi.Filters, m events.Message) bool {
	if !f.Has("image") {
		return true
	}
	name := m.Actor.Attributes["name"]
	id := m.Actor.ID
	if m.Type == events.ContainerEventType {
		id, name = "", m.Actor.Attributes["image"]
	}
	return slices.ContainsFunc(f["image"], func(want string) bool {
		return want == id || want == name || want == withoutTag(name) || want == withoutTag(id)
	})
}

func withoutTag(ref string) string {
	if at := strings.LastIndexByte(ref, ':'); at > strings.LastIndexByte(ref, '/') {
		return ref[:at]
	}
	return ref
}
