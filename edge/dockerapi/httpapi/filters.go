package httpapi

import (
	"encoding/json"
	"maps"
	"net/http"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/skep-dev/skep/core/model"
)

// Filters is a parsed `filters` query: for each key its values, sorted and distinct.
// Keys are combined with AND, values of one key with OR. The nil Filters match all.
type Filters map[string][]string

// RequestFilters parses and checks the filters of a request. accepted lists the keys that
// the endpoint knows.
func RequestFilters(r *http.Request, accepted ...string) (Filters, error) {
	f, err := ParseFilters(r.URL.Query().Get("filters"))
	if err != nil {
		return nil, err
	}
	for _, key := range slices.Sorted(maps.Keys(f)) {
		if !slices.Contains(accepted, key) {
			return nil, Errorf(http.StatusBadRequest, "invalid filter '%s'", key)
		}
	}
	return f, nil
}

// ParseFilters reads {"key":{"value":true}} and the older {"key":["value"]}. Keys
// without values are dropped.
func ParseFilters(text string) (Filters, error) {
	if text == "" {
		return nil, nil
	}
	f := make(Filters)
	var sets map[string]map[string]bool
	if err := json.Unmarshal([]byte(text), &sets); err == nil {
		for key, set := range sets {
			f.set(key, slices.Collect(maps.Keys(set)))
		}
		return f, nil
	}
	var lists map[string][]string
	if err := json.Unmarshal([]byte(text), &lists); err != nil {
		return nil, Errorf(http.StatusBadRequest, "invalid filter")
	}
	for key, list := range lists {
		f.set(key, list)
	}
	return f, nil
}

func (f Filters) set(key string, values []string) {
	if len(values) == 0 {
		return
	}
	slices.Sort(values)
	f[key] = slices.Compact(values)
}

// Has reports whether the key was given with a value.
func (f Filters) Has(key string) bool { return len(f[key]) > 0 }

// Exact reports whether the key is absent or one of its values is value.
func (f Filters) Exact(key, value string) bool {
	return !f.Has(key) || slices.Contains(f[key], value)
}

// Prefix reports whether the key is absent or one of its values begins value.
func (f Filters) Prefix(key, value string) bool {
	return !f.Has(key) || slices.ContainsFunc(f[key], func(p string) bool { return strings.HasPrefix(value, p) })
}

// Match reports whether the key is absent or one of its values equals value, is part
// of it, or matches it as a regular expression or shell pattern.
func (f Filters) Match(key, value string) bool {
	return !f.Has(key) || slices.ContainsFunc(f[key], func(p string) bool {
		if strings.Contains(value, p) {
			return true
		}
		if re, err := regexp.Compile(p); err == nil && re.MatchString(value) {
			return true
		}
		ok, err := path.Match(p, value)
		return err == nil && ok
	})
}

// Labels reports whether the key is absent or all its values, "k" or "k=v", are in labels.
func (f Filters) Labels(key string, labels map[string]string) bool {
	for _, want := range f[key] {
		k, v, hasValue := strings.Cut(want, "=")
		got, ok := labels[k]
		if !ok || (hasValue && got != v) {
			return false
		}
	}
	return true
}

// Bool returns the value of a boolean filter, or fallback when it is absent. Anything
// but one of true/1 or false/0 is an error.
func (f Filters) Bool(key string, fallback bool) (bool, error) {
	if !f.Has(key) {
		return fallback, nil
	}
	yes := slices.Contains(f[key], "true") || slices.Contains(f[key], "1")
	no := slices.Contains(f[key], "false") || slices.Contains(f[key], "0")
	if yes == no {
		return false, Errorf(http.StatusBadRequest, "invalid filter '%s=[%s]'", key, strings.Join(f[key], " "))
	}
	return yes, nil
}

// Until reads a filter of that name: a unix time, an RFC 3339 time or a duration before now.
func Until(text string, now time.Time) (time.Time, error) {
	if d, err := time.ParseDuration(text); err == nil {
		return now.Add(-d), nil
	}
	if t, err := time.Parse(time.RFC3339Nano, text); err == nil {
		return t, nil
	}
	t, err := Time(text)
	if err != nil {
		return time.Time{}, model.Errorf(model.Invalid, "invalid filter 'until=%s'", text)
	}
	return t, nil
}
