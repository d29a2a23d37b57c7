package ops

import (
	"slices"
	"strings"
)

// within reports whether wanted is empty or has value.
func within[T comparable](value T, wanted []T) bool {
	return len(wanted) == 0 || slices.Contains(wanted, value)
}

// begins reports whether prefixes is empty or one of them begins value.
func begins(value string, prefixes []string) bool {
	return len(prefixes) == 0 || slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(value, p) })
}

// labelled reports whether labels has every wanted key, with the wanted value unless
// that is empty.
func labelled(labels, wanted map[string]string) bool {
	for k, v := range wanted {
		got, ok := labels[k]
		if !ok || (v != "" && got != v) {
			return false
		}
	}
	return true
}

// named is the filter that secrets, configs, networks, clusters and resources share:
// names, name prefixes and id prefixes are alternatives, and names have no case.
type named interface {
	GetNames() []string
	GetIdPrefixes() []string
	GetNamePrefixes() []string
	GetLabels() map[string]string
}

func matchNamed(f named, id, name string, labels map[string]string) bool {
	if !labelled(labels, f.GetLabels()) {
		return false
	}
	if len(f.GetNames())+len(f.GetIdPrefixes())+len(f.GetNamePrefixes()) == 0 {
		return true
	}
	folded := strings.ToLower(name)
	return slices.ContainsFunc(f.GetNames(), func(n string) bool { return strings.EqualFold(n, name) }) ||
		slices.ContainsFunc(f.GetNamePrefixes(), func(p string) bool { return strings.HasPrefix(folded, strings.ToLower(p)) }) ||
		slices.ContainsFunc(f.GetIdPrefixes(), func(p string) bool { return strings.HasPrefix(id, p) })
}
