package httpapi_test

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/moby/moby/api/pkg/stdcopy"

	"github.com/skep-dev/skep/edge/dockerapi/httpapi"
)

func TestFrames(t *testing.T) {
	var b bytes.Buffer
	for _, part := range []struct {
		stream byte
		text   string
	}{{httpapi.Stdout, "out\n"}, {httpapi.Stderr, "err\n"}, {httpapi.Stdout, "more"}} {
		if n, err := io.WriteString(httpapi.Frames(&b, part.stream), part.text); err != nil || n != len(part.text) {
			t.Fatalf("%d %v", n, err)
		}
	}
	var out, errs bytes.Buffer
	if _, err := stdcopy.StdCopy(&out, &errs, &b); err != nil {
		t.Fatal(err)
	}
	if out.String() != "out\nmore" || errs.String() != "err\n" {
		t.Errorf("out %q, err %q", out.String(), errs.String())
	}
	if _, err := io.WriteString(httpapi.Frames(&b, httpapi.System), "bad things"); err != nil {
		t.Fatal(err)
	}
	if _, err := stdcopy.StdCopy(&out, &errs, &b); err == nil || !strings.Contains(err.Error(), "bad things") {
		t.Errorf("system frame: %v", err)
	}
}

// echo serves one route that takes the connection over and sends back what it gets.
func echo(t *testing.T) string {
	t.Helper()
	rt := newRouter()
	rt.Handle("POST", "/attach", func(w http.ResponseWriter, r *http.Request) error {
		conn, err := httpapi.Hijack(w, r, httpapi.StreamType(r, false))
		if err != nil {
			return err
		}
		defer conn.Close()
		if _, err := io.Copy(conn, conn); err != nil {
			return err
		}
		return conn.CloseWrite()
	})
	server := httptest.NewServer(rt)
	t.Cleanup(server.Close)
	return server.Listener.Addr().String()
}

func TestHijack(t *testing.T) {
	addr := echo(t)
	tests := []struct{ name, head, want string }{
		{"upgrade", "Connection: Upgrade\r\nUpgrade: tcp\r\n", "HTTP/1.1 101 UPGRADED"},
		{"plain", "", "HTTP/1.1 200 OK"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			fmt.Fprintf(conn, "POST /v1.44/attach HTTP/1.1\r\nHost: x\r\n%sContent-Length: 0\r\n\r\n", tt.head)
			r := bufio.NewReader(conn)
			line, err := r.ReadString('\n')
			if err != nil || strings.TrimSpace(line) != tt.want {
				t.Fatalf("%q %v", line, err)
			}
			head := ""
			for line != "\r\n" {
				if line, err = r.ReadString('\n'); err != nil {
					t.Fatal(err)
				}
				head += line
			}
			for _, want := range []string{"Api-Version: 1.55", "Content-Type: application/vnd.docker."} {
				if !strings.Contains(head, want) {
					t.Errorf("no %q in %q", want, head)
				}
			}
			if _, err := io.WriteString(conn, "hello"); err != nil {
				t.Fatal(err)
			}
			if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if rest, err := io.ReadAll(r); err != nil || string(rest) != "hello" {
				t.Errorf("%q %v", rest, err)
			}
		})
	}
}

func TestBeginFlushesAtOnce(t *testing.T) {
	release := make(chan struct{})
	rt := newRouter()
	rt.Handle("GET", "/x", func(w http.ResponseWriter, _ *http.Request) error {
		out := httpapi.Begin(w, "application/json")
		<-release
		_, err := io.WriteString(out, "done")
		return err
	})
	server := httptest.NewServer(rt)
	defer server.Close()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, server.URL+"/x", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req) // returns once the headers are here
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	close(release)
	if got, err := io.ReadAll(resp.Body); err != nil || string(got) != "done" || resp.Header.Get("Content-Type") != "application/json" {
		t.Errorf("%q %q", got, resp.Header.Get("Content-Type"))
	}
}
