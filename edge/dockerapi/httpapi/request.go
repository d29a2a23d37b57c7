package httpapi

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"mime"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/api/types/registry"
)

// maxBody bounds a JSON body: two of the largest config (1 MB) in base64 fit many times.
const maxBody = 8 << 20

// ReadJSON decodes the body, which must be there, into v. Unknown members are ignored.
func ReadJSON(w http.ResponseWriter, r *http.Request, v any) error {
	return readJSON(w, r, v, true)
}

// ReadOptionalJSON is ReadJSON that leaves v alone when there is no body.
func ReadOptionalJSON(w http.ResponseWriter, r *http.Request, v any) error {
	return readJSON(w, r, v, false)
}

func readJSON(w http.ResponseWriter, r *http.Request, v any, required bool) error {
	if r.Body == nil || r.ContentLength == 0 {
		if required {
			return Errorf(http.StatusBadRequest, "invalid JSON: got EOF while reading request body")
		}
		return nil
	}
	body := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody))
	// A chunked body may turn out to be empty, which needs no content type.
	err := body.Decode(v)
	if errors.Is(err, io.EOF) && !required {
		return nil
	}
	if typeErr := checkContentType(r.Header.Get("Content-Type")); typeErr != nil {
		return typeErr
	}
	switch _, tooLarge := errors.AsType[*http.MaxBytesError](err); {
	case tooLarge:
		return Errorf(http.StatusRequestEntityTooLarge, "request body is larger than %d bytes", maxBody)
	case errors.Is(err, io.EOF):
		return Errorf(http.StatusBadRequest, "invalid JSON: got EOF while reading request body")
	case err != nil:
		return Errorf(http.StatusBadRequest, "invalid JSON: %v", err)
	}
	if _, err := body.Token(); !errors.Is(err, io.EOF) {
		return Errorf(http.StatusBadRequest, "unexpected content after JSON")
	}
	return nil
}

func checkContentType(header string) error {
	kind, _, err := mime.ParseMediaType(header)
	if err != nil {
		return Errorf(http.StatusBadRequest, "malformed Content-Type header (%s): %v", header, err)
	}
	if kind != "application/json" {
		return Errorf(http.StatusBadRequest, "unsupported Content-Type header (%s): must be 'application/json'", header)
	}
	return nil
}

// Bool reads a query parameter as Docker does: absent, empty, "0", "no", "false" and
// "none" are false, anything else is true.
func Bool(r *http.Request, key string) bool {
	switch strings.ToLower(strings.TrimSpace(r.URL.Query().Get(key))) {
	case "", "0", "no", "false", "none":
		return false
	default:
		return true
	}
}

// StrictBool reads a query parameter that must be a boolean of [strconv.ParseBool];
// absent or empty is false.
func StrictBool(r *http.Request, key string) (bool, error) {
	text := r.URL.Query().Get(key)
	if text == "" {
		return false, nil
	}
	b, err := strconv.ParseBool(text)
	if err != nil {
		return false, Errorf(http.StatusBadRequest, "invalid value for %s: %v", key, err)
	}
	return b, nil
}

// Time reads unix seconds with an optional fraction, "1700000000.123456789"; empty
// and "0" are the zero time.
func Time(text string) (time.Time, error) {
	if text == "" || text == "0" {
		return time.Time{}, nil
	}
	seconds, fraction, _ := strings.Cut(text, ".")
	s, err := strconv.ParseInt(seconds, 10, 64)
	if err != nil {
		return time.Time{}, err
	}
	var ns int64
	if fraction != "" {
		if len(fraction) > 9 {
			fraction = fraction[:9]
		}
		ns, err = strconv.ParseInt(fraction+strings.Repeat("0", 9-len(fraction)), 10, 64)
		if err != nil {
			return time.Time{}, err
		}
	}
	return time.Unix(s, ns), nil
}

// RegistryAuth decodes X-Registry-Auth, in any base64 alphabet, padded or not. An
// absent, empty or undecodable header means anonymous: nil.
func RegistryAuth(r *http.Request) *registry.AuthConfig {
	header := strings.NewReplacer("-", "+", "_", "/").Replace(r.Header.Get(registry.AuthHeader))
	data, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(header, "="))
	if err != nil || len(data) == 0 {
		return nil
	}
	auth := new(registry.AuthConfig)
	if err := json.Unmarshal(data, auth); err != nil || *auth == (registry.AuthConfig{}) {
		return nil
	}
	return auth
}
