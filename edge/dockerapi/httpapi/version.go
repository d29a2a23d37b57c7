package httpapi

import (
	"context"
	"net/http"
	"strconv"
	"strings"
)

// The range of API versions that are served. Old pinned clients (Traefik, swarmpit)
// ask for 1.24 and 1.30.
const (
	MinVersion = "1.24"
	MaxVersion = "1.55"
)

// Version is an API version such as 1.44. The zero Version is older than any.
type Version struct{ Major, Minor int }

// ParseVersion reads "1.44". Parts beyond the second are ignored; parts that are
// missing or no numbers count as 0.
func ParseVersion(s string) Version {
	major, rest, _ := strings.Cut(s, ".")
	minor, _, _ := strings.Cut(rest, ".")
	return Version{Major: number(major), Minor: number(minor)}
}

func number(s string) int {
	n, err := strconv.Atoi(s)
	if err != nil || n < 0 {
		return 0
	}
	return n
}

// Before reports whether v is older than 1.minor.
func (v Version) Before(minor int) bool { return v.less(Version{1, minor}) }

func (v Version) less(o Version) bool {
	if v.Major != o.Major {
		return v.Major < o.Major
	}
	return v.Minor < o.Minor
}

type versionKey struct{}

// RequestVersion returns the version that a request asked for, the maximum if none.
func RequestVersion(r *http.Request) Version {
	if v, ok := r.Context().Value(versionKey{}).(Version); ok {
		return v
	}
	return ParseVersion(MaxVersion)
}

// WithVersion returns a request for another version, for tests and internal calls.
func WithVersion(r *http.Request, v Version) *http.Request {
	return r.WithContext(context.WithValue(r.Context(), versionKey{}, v))
}

// splitVersion cuts "/v1.44" off a path. found is false for a path without version.
func splitVersion(path string) (version, rest string, found bool) {
	after, ok := strings.CutPrefix(path, "/v")
	if !ok {
		return "", path, false
	}
	version, rest, ok = strings.Cut(after, "/")
	if !ok || version == "" || strings.Trim(version, "0123456789.") != "" {
		return "", path, false
	}
	return version, "/" + rest, true
}

// checkVersion returns the error of a version outside the served range, or nil.
func checkVersion(text string) error {
	switch v := ParseVersion(text); {
	case v.less(ParseVersion(MinVersion)):
		return Errorf(http.StatusBadRequest, "client version %s is too old. Minimum supported API version is %s, please upgrade your client to a newer version", text, MinVersion)
	case ParseVersion(MaxVersion).less(v):
		return Errorf(http.StatusBadRequest, "client version %s is too new. Maximum supported API version is %s", text, MaxVersion)
	default:
		return nil
	}
}
