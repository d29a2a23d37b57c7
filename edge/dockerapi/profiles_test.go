package dockerapi

import (
	"io"
	"log/slog"
	"net/http/httptest"
	"strings"
	"testing"
)

// debugged is a daemon of which only the facts are asked.
type debugged struct {
	Daemon

	on bool
}

func (d debugged) Facts() Facts { return Facts{Debug: d.on} }

// TestProfiles: the runtime's profiles are there with --debug, and only then.
func TestProfiles(t *testing.T) {
	for _, c := range []struct {
		debug      bool
		path, want string
		status     int
	}{
		{true, "/debug/pprof/goroutine?debug=1", "goroutine profile: total", 200},
		{true, "/debug/pprof/nothing", "no profile nothing: there are allocs, block", 404},
		{false, "/debug/pprof/goroutine?debug=1", "started with --debug", 404},
	} {
		server := httptest.NewServer(New(Config{Daemon: debugged{on: c.debug}, Log: slog.New(slog.DiscardHandler)}).Handler())
		defer server.Close()
		resp, err := server.Client().Get(server.URL + c.path)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != c.status || !strings.Contains(string(body), c.want) {
			t.Errorf("debug %v, %s: %d %.200s, %v", c.debug, c.path, resp.StatusCode, body, err)
		}
		_ = resp.Body.Close()
	}
}
