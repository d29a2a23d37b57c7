package httpapi

import (
	"net/url"
	"slices"
	"strings"
)

// Attributes encodes the details of a line of a log: "k=v,k=v", sorted by key and escaped.
func Attributes(attrs map[string]string) string {
	pairs := make([]string, 0, len(attrs))
	for key, value := range attrs {
		pairs = append(pairs, url.QueryEscape(key)+"="+url.QueryEscape(value))
	}
	slices.Sort(pairs)
	return strings.Join(pairs, ",")
}
