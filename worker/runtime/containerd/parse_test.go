package containerd

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/moby/api/types/container"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func FuzzParseNetDev(f *testing.F) {
	f.Add([]byte("Inter-|   Receive\n face |bytes\n    lo: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n  eth0: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, ok := parseNetDev(b)["lo"]; ok {
			t.Error("loopback counts as a network")
		}
	})
}

func FuzzParseSize(f *testing.F) {
	for _, s := range []string{"10m", "512k", "1g", "-1", "100", "1tb", "9999999999g"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if n, err := parseSize(s); err == nil && n <= 0 && n != -1 {
			t.Errorf("%q is %d", s, n)
		}
	})
}

func FuzzParsePS(f *testing.F) {
	f.Add("UID PID CMD\nroot 7 sleep 100\nroot 8 other")
	f.Add("COMMAND PID\nsleep 100 7\n0 7 00")
	f.Fuzz(func(t *testing.T, out string) {
		top, err := parsePS(out, []string{"7"})
		if err != nil {
			return
		}
		at := slices.Index(top.Titles, "PID")
		for _, row := range top.Processes {
			if len(row) > len(top.Titles) || row[at] != "7" {
				t.Errorf("row %q of %q", row, out)
			}
		}
	})
}

func FuzzDeviceRule(f *testing.F) {
	f.Add("c 1:3 rwm")
	f.Add("b *:* r")
	f.Fuzz(func(_ *testing.T, rule string) { _, _ = deviceRule(rule) })
}

func TestLookupUser(t *testing.T) {
	files := map[string]string{
		"etc/passwd": "root:x:0:0::/root:/bin/sh\nbee:x:7:8::/:/bin/sh\n",
		"etc/group":  "bee:x:8:\nhive:x:9:bee,root\n",
	}
	read := func(name string) []byte { return []byte(files[name]) }
	none := func(string) []byte { return nil }
	for _, c := range []struct {
		spec   string
		groups []string
		read   func(string) []byte
		want   specs.User
		err    string
	}{
		{"", nil, read, specs.User{AdditionalGids: []uint32{0, 9}}, ""},
		{"", nil, none, specs.User{AdditionalGids: []uint32{0}}, ""},
		{"bee", nil, read, specs.User{UID: 7, GID: 8, AdditionalGids: []uint32{8, 9}}, ""},
		{"bee:hive", nil, read, specs.User{UID: 7, GID: 9, AdditionalGids: []uint32{9}}, ""},
		{"100:200", []string{"hive"}, read, specs.User{UID: 100, GID: 200, AdditionalGids: []uint32{200, 9}}, ""},
		{"wasp", nil, read, specs.User{}, "unable to find user wasp"},
	} {
		got, err := lookupUser(c.spec, c.groups, c.read)
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%q: error %v", c.spec, err)
			}
			continue
		}
		if d := cmp.Diff(c.want, got); d != "" || err != nil {
			t.Errorf("%q: %s, %v", c.spec, d, err)
		}
	}
}

func TestCustomSeccompDependsOnCapabilities(t *testing.T) {
	host := &container.HostConfig{SecurityOpt: []string{`seccomp={"defaultAction":"SCMP_ACT_ERRNO","syscalls":[
		{"names":["read"],"action":"SCMP_ACT_ALLOW"},
		{"names":["mount"],"action":"SCMP_ACT_ALLOW","includes":{"caps":["CAP_SYS_ADMIN"]}},
		{"names":["clone"],"action":"SCMP_ACT_ALLOW","excludes":{"caps":["CAP_SYS_ADMIN"]}}]}`}}
	sec, err := securityOptions(host)
	if err != nil {
		t.Fatal(err)
	}
	names := func(caps ...string) (out []string) {
		for _, s := range sec.profile.spec(caps).Syscalls {
			out = append(out, s.Names...)
		}
		return out
	}
	if d := cmp.Diff([]string{"read", "clone"}, names()); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff([]string{"read", "mount"}, names("CAP_SYS_ADMIN")); d != "" {
		t.Error(d)
	}
}

func TestLayers(t *testing.T) {
	mounts := []rootMount{{Type: "overlay", Source: "overlay", Options: []string{"index=off", "workdir=/w", "upperdir=/u", "lowerdir=/a:/b"}}}
	if d := cmp.Diff([]string{"/u", "/a", "/b"}, layerDirs(mounts)); d != "" {
		t.Error(d)
	}
}

// TestParsePSCommandFirst: the extra words of a row belong to the command, wherever it is.
func TestParsePSCommandFirst(t *testing.T) {
	top, err := parsePS("COMMAND PID\nsleep 100 7\nsleep 7 8\n", []string{"7"})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([][]string{{"sleep 100", "7"}}, top.Processes); diff != "" {
		t.Error(diff)
	}
}
