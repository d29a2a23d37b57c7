package unlock

import (
	"bufio"
	"bytes"
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
)

var kek = bytes.Repeat([]byte{7}, pki.KEKLength)

func TestParse(t *testing.T) {
	for text, want := range map[string]model.Kind{
		"": model.Invalid, "exec": model.Invalid, "exec:relative": model.Invalid, "http:/x": model.Invalid, "peers": model.Invalid,
	} {
		if _, err := Parse(text); model.KindOf(err) != want {
			t.Errorf("%q: %v", text, err)
		}
	}
	for _, text := range []string{"exec:/a/b:c", "unix:/s"} {
		if p, err := Parse(text); err != nil || p.String() != text {
			t.Errorf("%q reads as %s, %v", text, p, err)
		}
	}
}

func TestProgram(t *testing.T) {
	dir := t.TempDir()
	program := func(script string) Provider {
		path := filepath.Join(dir, "program")
		if err := os.WriteFile(path, []byte("#!/bin/sh\n"+script+"\n"), 0o700); err != nil {
			t.Fatal(err)
		}
		return Provider{kind: "exec", path: path}
	}
	req := Request{ClusterID: "c1", NodeID: "n1", KEKVersion: 12}
	p := program(`grep -q '"op":"unlock","cluster_id":"c1","node_id":"n1","kek_version":12' && echo ` + pki.EncodeUnlockKey(kek) + ` && echo more`)
	if got, err := p.Key(t.Context(), req); err != nil || !bytes.Equal(got, kek) {
		t.Errorf("key %x, %v", got, err)
	}
	for script, want := range map[string]string{
		"echo 'no token' >&2; exit 3": "exit status 3: no token",
		"echo SWMKEY-1-oops":          "is no unlock key",
		"true":                        "is no unlock key",
	} {
		if _, err := program(script).Key(t.Context(), req); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "oops") {
			t.Errorf("%s: %v", script, err)
		}
	}
	if _, err := (Provider{kind: "exec", path: filepath.Join(dir, "none")}).Key(t.Context(), req); err == nil {
		t.Error("a missing program gave a key")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := program("sleep 60").Key(ctx, req); err == nil {
		t.Error("no end")
	}
}

func TestSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	listen, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	answers := []string{pki.EncodeUnlockKey(kek) + "\n", pki.EncodeUnlockKey(kek), strings.Repeat("x", 2*maxAnswer), ""}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for _, answer := range answers {
			conn, err := listen.Accept()
			if err != nil {
				return
			}
			line, err := bufio.NewReader(conn).ReadString('\n')
			if err == nil && strings.Contains(line, `"node_id":"n1"`) {
				_, _ = conn.Write([]byte(answer)) // the last ones are not read to their end
			}
			conn.Close()
		}
	}()
	p := Provider{kind: "unix", path: path}
	for i := range answers {
		got, err := p.Key(t.Context(), Request{NodeID: "n1"})
		if (err == nil) != (i < 2) || err == nil && !bytes.Equal(got, kek) {
			t.Errorf("answer %d: %x, %v", i, got, err)
		}
	}
	listen.Close()
	<-done
	if _, err := p.Key(t.Context(), Request{}); err == nil {
		t.Error("nobody gave a key")
	}
}

// FuzzParseAnswer reads what a provider says.
func FuzzParseAnswer(f *testing.F) {
	f.Add([]byte(pki.EncodeUnlockKey(kek) + "\n"))
	f.Add([]byte("SWMKEY-1-"))
	f.Add([]byte(nil))
	f.Fuzz(func(t *testing.T, answer []byte) {
		if kek, err := parseAnswer(answer); err == nil && len(kek) != pki.KEKLength {
			t.Errorf("a key of %d bytes", len(kek))
		}
	})
}
