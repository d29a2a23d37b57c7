package docker

import (
	"slices"
	"strings"
	"time"

	"github.com/skep-dev/skep/worker/runtime"
)

// Prunable reports whether a prune may take an unused object by its age and labels.
func Prunable(opts runtime.PruneOptions, created time.Time, labels map[string]string) bool {
	matches := func(filter string) bool {
		key, value, hasValue := strings.Cut(filter, "=")
		have, ok := labels[key]
		return ok && (!hasValue || have == value)
	}
	if !opts.Until.IsZero() && created.After(opts.Until) {
		return false
	}
	for _, l := range opts.Labels {
		if !matches(l) {
			return false
		}
	}
	return !slices.ContainsFunc(opts.NotLabels, matches)
}
