package httpapi_test

import (
	"net/http/httptest"
	"net/url"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/moby/api/types/registry"

	"github.com/skep-dev/skep/edge/dockerapi/httpapi"
)

func TestParseFilters(t *testing.T) {
	tests := []struct {
		text string
		want httpapi.Filters
		bad  bool
	}{
		{``, nil, false},
		{`{}`, httpapi.Filters{}, false},
		{`{"k":{"b":true,"a":true}}`, httpapi.Filters{"k": {"a", "b"}}, false},
		{`{"k":["b","a","b"]}`, httpapi.Filters{"k": {"a", "b"}}, false},
		{`{"k":{}}`, httpapi.Filters{}, false},
		{`{"k":"v"}`, nil, true},
		{`garbage`, nil, true},
		{`[]`, nil, true},
	}
	for _, tt := range tests {
		got, err := httpapi.ParseFilters(tt.text)
		if (err != nil) != tt.bad {
			t.Errorf("%s: %v", tt.text, err)
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s: %s", tt.text, diff)
		}
	}
}

func TestRequestFilters(t *testing.T) {
	r := httptest.NewRequestWithContext(t.Context(), "GET", "/?filters="+url.QueryEscape(`{"bogus":{"x":true}}`), nil)
	_, err := httpapi.RequestFilters(r, "name")
	if err == nil || err.Error() != "invalid filter 'bogus'" || httpapi.StatusOf(err) != 400 {
		t.Errorf("unknown key: %v", err)
	}
	if _, err := httpapi.RequestFilters(r, "name", "bogus"); err != nil {
		t.Errorf("known key: %v", err)
	}
}

func TestFilterMatching(t *testing.T) {
	f := httpapi.Filters{"name": {"we", "x.*z"}, "label": {"a", "b=1"}, "dangling": {"true"}, "odd": {"maybe"}}
	check := func(what string, got, want bool) {
		t.Helper()
		if got != want {
			t.Errorf("%s: %v", what, got)
		}
	}
	check("prefix", f.Prefix("name", "web"), true)
	check("no prefix", f.Prefix("name", "aweb"), false)
	check("absent prefix", f.Prefix("id", "anything"), true)
	check("exact", f.Exact("name", "we"), true)
	check("not exact", f.Exact("name", "web"), false)
	check("part", f.Match("name", "aweb"), true)
	check("expression", f.Match("name", "xyz"), true)
	check("no match", f.Match("name", "abc"), false)
	check("labels", f.Labels("label", map[string]string{"a": "", "b": "1"}), true)
	check("labels with another value", f.Labels("label", map[string]string{"a": "", "b": "2"}), false)
	check("labels missing", f.Labels("label", map[string]string{"b": "1"}), false)
	if v, err := f.Bool("dangling", false); err != nil || !v {
		t.Errorf("bool: %v %v", v, err)
	}
	if v, err := f.Bool("absent", true); err != nil || !v {
		t.Errorf("absent bool: %v %v", v, err)
	}
	if _, err := f.Bool("odd", false); err == nil || err.Error() != "invalid filter 'odd=[maybe]'" {
		t.Errorf("odd bool: %v", err)
	}
}

func FuzzParseFilters(f *testing.F) {
	for _, seed := range []string{``, `{"k":{"v":true}}`, `{"k":["v","w"]}`, `{"k":{}}`, `{"":[""]}`, `x`} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		got, err := httpapi.ParseFilters(text)
		if err != nil {
			return
		}
		for key, values := range got {
			if len(values) == 0 || !slices.IsSorted(values) || len(slices.Compact(slices.Clone(values))) != len(values) {
				t.Errorf("%q: values of %q are %q", text, key, values)
			}
			got.Match(key, "value")
			for _, v := range values {
				if !got.Exact(key, v) || !got.Prefix(key, v) || !got.Match(key, v) {
					t.Errorf("%q: %q does not match itself", text, v)
				}
			}
		}
	})
}

func FuzzVersion(f *testing.F) {
	for _, seed := range []string{"1.24", "1.99", "", "1", "..", "1.2.3"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if v := httpapi.ParseVersion(text); v.Major < 0 || v.Minor < 0 {
			t.Errorf("%q: %v", text, v)
		}
	})
}

func FuzzTime(f *testing.F) {
	for _, seed := range []string{"", "0", "1700000000", "1700000000.5", "1.9999999999", "-1.5", "x", "1."} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if at, err := httpapi.Time(text); err == nil && at.IsZero() != (text == "" || text == "0") && at.Unix() != -62135596800 {
			t.Errorf("%q: %v", text, at)
		}
	})
}

func FuzzRegistryAuth(f *testing.F) {
	for _, seed := range []string{"", "e30=", "eyJ1c2VybmFtZSI6ImEifQ", "====", "_-"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, header string) {
		r := httptest.NewRequestWithContext(t.Context(), "GET", "/", nil)
		r.Header["X-Registry-Auth"] = []string{header}
		if auth := httpapi.RegistryAuth(r); auth != nil && *auth == (registry.AuthConfig{}) {
			t.Errorf("%q is anonymous, not empty", header)
		}
	})
}
