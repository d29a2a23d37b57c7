package docker

import (
	"maps"
	"strings"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
)

// ContainerEvent makes the event of a container: its labels, image and name are
// attributes, and so are extra, given as alternating keys and values.
func ContainerEvent(action events.Action, id, name string, cfg *container.Config, extra ...string) events.Message {
	attrs := make(map[string]string, len(cfg.Labels)+2+len(extra)/2)
	maps.Copy(attrs, cfg.Labels)
	attrs["image"] = cfg.Image
	attrs["name"] = strings.TrimPrefix(name, "/")
	for i := 0; i+1 < len(extra); i += 2 {
		attrs[extra[i]] = extra[i+1]
	}
	return events.Message{
		Type:   events.ContainerEventType,
		Action: action,
		Actor:  events.Actor{ID: id, Attributes: attrs},
	}
}
