package httpapi_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/edge/dockerapi/httpapi"
	"github.com/skep-dev/skep/worker/runtime"
)

func newRouter() *httpapi.Router {
	return httpapi.NewRouter(httpapi.Config{
		ServerVersion: "1.2.3", Log: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(),
	})
}

// answer is a response, read.
type answer struct {
	status int
	header http.Header
	body   string
}

func do(t *testing.T, h http.Handler, method, target, body string, header ...string) answer {
	t.Helper()
	r := httptest.NewRequestWithContext(t.Context(), method, target, strings.NewReader(body))
	for i := 0; i < len(header); i += 2 {
		r.Header.Add(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return answer{w.Code, w.Header(), w.Body.String()}
}

func TestRoutes(t *testing.T) {
	rt := newRouter()
	for _, route := range [][2]string{
		{"GET", "/images/json"},
		{"GET", "/images/{name...}/json"},
		{"GET", "/images/{name...}/get"},
		{"GET", "/services/{id}"},
		{"POST", "/services/create"},
		{"POST", "/services/{id}/update"},
		{"GET", "/networks/{id...}"},
		{"HEAD", "/_ping"},
	} {
		rt.Handle(route[0], route[1], func(w http.ResponseWriter, r *http.Request) error {
			_, err := fmt.Fprintf(w, "%s id=%s name=%s v=%v", route[1], r.PathValue("id"), r.PathValue("name"), httpapi.RequestVersion(r))
			return err
		})
	}
	tests := []struct{ method, path, want string }{
		{"GET", "/v1.44/images/json", "/images/json id= name= v={1 44}"},
		{"GET", "/images/reg:5000/a/b:c/json", "/images/{name...}/json id= name=reg:5000/a/b:c v={1 55}"},
		{"GET", "/v1.24/images/a@sha256:1/get", "/images/{name...}/get id= name=a@sha256:1 v={1 24}"},
		{"GET", "/services/a%20b", "/services/{id} id=a b name= v={1 55}"},
		{"POST", "/v1.44/services/create", "/services/create id= name= v={1 44}"},
		{"POST", "/v1.44.0/services/x/update", "/services/{id}/update id=x name= v={1 44}"},
		{"GET", "/networks/a/b", "/networks/{id...} id=a/b name= v={1 55}"},
		{"GET", "/services/a/b", `{"message":"page not found"}` + "\n"},
		{"DELETE", "/services/a", `{"message":"page not found"}` + "\n"},
		{"GET", "/vx/services/a", `{"message":"page not found"}` + "\n"},
		{"GET", "/", `{"message":"page not found"}` + "\n"},
		{"OPTIONS", "/anything", ""},
		{"GET", "/v1.23/images/json", "client version 1.23 is too old. Minimum supported API version is 1.24, please upgrade your client to a newer version\n"},
		{"GET", "/v1.99/images/json", `{"message":"client version 1.99 is too new. Maximum supported API version is 1.55"}` + "\n"},
	}
	for _, tt := range tests {
		resp := do(t, rt, tt.method, tt.path, "")
		if got := resp.body; got != tt.want {
			t.Errorf("%s %s: %q, want %q", tt.method, tt.path, got, tt.want)
		}
		known := resp.status != http.StatusNotFound && tt.method != "OPTIONS"
		if got := resp.header.Get("Api-Version"); (got == "1.55") != known {
			t.Errorf("%s %s: Api-Version %q", tt.method, tt.path, got)
		}
	}
	if resp := do(t, rt, "GET", "/v1.23/images/json", ""); resp.header.Get("Content-Type") != "text/plain; charset=utf-8" {
		t.Errorf("answers to clients before 1.24 are %s", resp.header.Get("Content-Type"))
	}
	resp := do(t, rt, "GET", "/images/json", "")
	want := map[string]string{"Server": "Docker/1.2.3 (linux)", "Ostype": "linux", "Docker-Experimental": "false"}
	for k, v := range want {
		if resp.header.Get(k) != v {
			t.Errorf("%s: %q, want %q", k, resp.header.Get(k), v)
		}
	}
	if !rt.Has("GET", "/services/{other}") || rt.Has("GET", "/services/{id...}") {
		t.Error("Has compares patterns without the names of their parameters")
	}
}

func TestErrors(t *testing.T) {
	tests := []struct {
		err    error
		status int
		text   string
	}{
		{model.Errorf(model.Invalid, "bad <x> & y"), 400, "bad <x> & y"},
		{model.Errorf(model.Precondition, "not now"), 400, "not now"},
		{model.Errorf(model.NotFound, "node X not found"), 404, "node X not found"},
		{model.Errorf(model.Exists, "taken"), 409, "taken"},
		{model.Errorf(model.Conflict, "container x is not running"), 409, "container x is not running"},
		{model.Errorf(model.Denied, "no"), 403, "no"},
		{model.Errorf(model.Exhausted, "full"), 500, "full"},
		{model.Errorf(model.Unavailable, "later"), 503, "later"},
		{model.Errorf(model.Unimplemented, "never"), 501, "never"},
		{model.Errorf(model.Internal, "oops"), 500, "oops"},
		{errors.New("foreign"), 500, "foreign"},
		{fmt.Errorf("wrapped: %w", model.Errorf(model.NotFound, "x")), 404, "wrapped: x"},
		{httpapi.Errorf(http.StatusUnauthorized, "who"), 401, "who"},
		{runtime.ErrNotModified, 304, ""},
		{context.Canceled, 500, "context canceled"},
		{status.Error(codes.InvalidArgument, "x"), 400, "rpc error: code = InvalidArgument desc = x"},
		{status.Error(codes.FailedPrecondition, "x"), 400, "rpc error: code = FailedPrecondition desc = x"},
		{status.Error(codes.OutOfRange, "x"), 400, "rpc error: code = OutOfRange desc = x"},
		{status.Error(codes.Unauthenticated, "x"), 401, "rpc error: code = Unauthenticated desc = x"},
		{status.Error(codes.PermissionDenied, "x"), 403, "rpc error: code = PermissionDenied desc = x"},
		{status.Error(codes.NotFound, "x"), 404, "rpc error: code = NotFound desc = x"},
		{status.Error(codes.AlreadyExists, "x"), 409, "rpc error: code = AlreadyExists desc = x"},
		{status.Error(codes.Unimplemented, "x"), 501, "rpc error: code = Unimplemented desc = x"},
		{status.Error(codes.Unavailable, "x"), 503, "rpc error: code = Unavailable desc = x"},
		{status.Error(codes.Unknown, "update out of sequence"), 500, "rpc error: code = Unknown desc = update out of sequence"},
		{status.Error(codes.DeadlineExceeded, "x"), 500, "rpc error: code = DeadlineExceeded desc = x"},
		{status.Error(codes.Aborted, "x"), 500, "rpc error: code = Aborted desc = x"},
		{fmt.Errorf("wrapped: %w", status.Error(codes.NotFound, "x")), 404, "wrapped: rpc error: code = NotFound desc = x"},
	}
	for _, tt := range tests {
		rt := newRouter()
		h := func(http.ResponseWriter, *http.Request) error { return tt.err }
		rt.Handle("GET", "/x", h)
		rt.Handle("HEAD", "/x", h)
		resp := do(t, rt, "GET", "/v1.41/x", "")
		want := `{"message":"` + tt.text + `"}` + "\n"
		if tt.text == "" {
			want = ""
		}
		if got := resp.body; resp.status != tt.status || got != want {
			t.Errorf("%v: %d %q, want %d %q", tt.err, resp.status, got, tt.status, want)
		}
		if want != "" && resp.header.Get("Content-Type") != "application/json" {
			t.Errorf("%v: content type %q", tt.err, resp.header.Get("Content-Type"))
		}
		if resp := do(t, rt, "HEAD", "/v1.41/x", ""); resp.body != "" {
			t.Errorf("%v: HEAD has a body", tt.err)
		}
	}
}

func TestErrorAfterAnswerHasBegun(t *testing.T) {
	rt := newRouter()
	rt.Handle("GET", "/x", func(w http.ResponseWriter, _ *http.Request) error {
		if _, err := io.WriteString(w, "begun"); err != nil {
			return err
		}
		return errors.New("too late")
	})
	if got := do(t, rt, "GET", "/x", "").body; got != "begun" {
		t.Errorf("got %q", got)
	}
}

func TestNotImplemented(t *testing.T) {
	rt := newRouter()
	rt.Handle("POST", "/build", httpapi.NotImplemented)
	resp := do(t, rt, "POST", "/v1.44/build", "")
	if got := resp.body; resp.status != http.StatusNotImplemented || got != `{"message":"POST /build is not implemented by skep"}`+"\n" {
		t.Errorf("%d %s", resp.status, got)
	}
}

func TestJSON(t *testing.T) {
	type value struct{ A string }
	rt := newRouter()
	rt.Handle("POST", "/need", func(w http.ResponseWriter, r *http.Request) error {
		var v value
		if err := httpapi.ReadJSON(w, r, &v); err != nil {
			return err
		}
		return httpapi.WriteJSON(w, http.StatusCreated, v)
	})
	rt.Handle("POST", "/may", func(w http.ResponseWriter, r *http.Request) error {
		v := value{A: "default"}
		if err := httpapi.ReadOptionalJSON(w, r, &v); err != nil {
			return err
		}
		return httpapi.WriteJSON(w, http.StatusOK, v)
	})
	tests := []struct{ path, kind, body, want string }{
		{"/need", "application/json", `{"A":"<b>&","Unknown":1}`, `{"A":"<b>&"}` + "\n"},
		{"/need", "application/json; charset=utf-8", `{"A":"x"} `, `{"A":"x"}` + "\n"},
		{"/need", "application/json", ``, `{"message":"invalid JSON: got EOF while reading request body"}` + "\n"},
		{"/need", "application/json", `{"A":`, `{"message":"invalid JSON: unexpected EOF"}` + "\n"},
		{"/need", "application/json", `{"A":1}`, `{"message":"invalid JSON: json: cannot unmarshal number into Go struct field value.A of type string"}` + "\n"},
		{"/need", "application/json", `{} {}`, `{"message":"unexpected content after JSON"}` + "\n"},
		{"/need", "text/plain", `{}`, `{"message":"unsupported Content-Type header (text/plain): must be 'application/json'"}` + "\n"},
		{"/need", "", `{}`, `{"message":"malformed Content-Type header (): mime: no media type"}` + "\n"},
		{"/may", "", ``, `{"A":"default"}` + "\n"},
		{"/may", "application/json", `{"A":"given"}`, `{"A":"given"}` + "\n"},
	}
	for _, tt := range tests {
		resp := do(t, rt, "POST", tt.path, tt.body, "Content-Type", tt.kind)
		if got := resp.body; got != tt.want {
			t.Errorf("%+v: %q", tt, got)
		}
		if got := resp.header.Get("Content-Type"); got != "application/json" {
			t.Errorf("%+v: content type %q", tt, got)
		}
	}
	resp := do(t, rt, "POST", "/need", `{"A":"`+strings.Repeat("x", 9<<20)+`"}`, "Content-Type", "application/json")
	if resp.status != http.StatusRequestEntityTooLarge {
		t.Errorf("9 MiB body: %d %s", resp.status, resp.body)
	}
}

func TestBool(t *testing.T) {
	for text, want := range map[string]bool{
		"": false, "0": false, "no": false, "False": false, "NONE": false, "1": true, "true": true, "yes": true, "x": true,
	} {
		r := httptest.NewRequestWithContext(t.Context(), "GET", "/?k="+text, nil)
		if got := httpapi.Bool(r, "k"); got != want {
			t.Errorf("Bool(%q) = %v", text, got)
		}
	}
	r := httptest.NewRequestWithContext(t.Context(), "GET", "/?k=yes&j=1", nil)
	if _, err := httpapi.StrictBool(r, "k"); httpapi.StatusOf(err) != 400 {
		t.Errorf("StrictBool(yes): %v", err)
	}
	if v, err := httpapi.StrictBool(r, "j"); err != nil || !v {
		t.Errorf("StrictBool(1): %v %v", v, err)
	}
}

func TestTime(t *testing.T) {
	for text, want := range map[string]string{
		"": "0001-01-01T00:00:00Z", "0": "0001-01-01T00:00:00Z", "1": "1970-01-01T00:00:01Z", "1.5": "1970-01-01T00:00:01.5Z",
		"1.000000001": "1970-01-01T00:00:01.000000001Z", "1.0000000019": "1970-01-01T00:00:01.000000001Z",
	} {
		got, err := httpapi.Time(text)
		if err != nil || got.UTC().Format("2006-01-02T15:04:05.999999999Z07:00") != want {
			t.Errorf("Time(%q) = %v, %v; want %s", text, got.UTC(), err, want)
		}
	}
	for _, text := range []string{"x", "1.x", "2024-01-01"} {
		if _, err := httpapi.Time(text); err == nil {
			t.Errorf("Time(%q) succeeded", text)
		}
	}
}

func TestRegistryAuth(t *testing.T) {
	const url, std = "eyJ1c2VybmFtZSI6ImE_Pz8-Iiwic2VydmVyYWRkcmVzcyI6InIifQ", "eyJ1c2VybmFtZSI6ImE/Pz8+Iiwic2VydmVyYWRkcmVzcyI6InIifQ"
	for _, header := range []string{url, url + "==", std, std + "=="} {
		r := httptest.NewRequestWithContext(t.Context(), "GET", "/", nil)
		r.Header.Set("X-Registry-Auth", header)
		if got := httpapi.RegistryAuth(r); got == nil || got.Username != "a???>" || got.ServerAddress != "r" {
			t.Errorf("%s: %+v", header, got)
		}
	}
	for _, header := range []string{"", "e30=", "e30", "%%%", "bm90IGpzb24="} {
		r := httptest.NewRequestWithContext(t.Context(), "GET", "/", nil)
		r.Header.Set("X-Registry-Auth", header)
		if got := httpapi.RegistryAuth(r); got != nil {
			t.Errorf("%q: %+v, want anonymous", header, got)
		}
	}
}

func TestVersions(t *testing.T) {
	for text, want := range map[string]httpapi.Version{"1.44": {1, 44}, "1.44.7": {1, 44}, "2": {2, 0}, "": {}, "x.y": {}, "..": {}} {
		if diff := cmp.Diff(want, httpapi.ParseVersion(text)); diff != "" {
			t.Errorf("%q: %s", text, diff)
		}
	}
	if v := httpapi.ParseVersion("1.41"); v.Before(41) || !v.Before(42) || httpapi.ParseVersion("2.0").Before(99) {
		t.Error("Before compares numbers")
	}
}
