package shim

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// containerd keeps nothing readable of a specification, and only its own key opens it.
func TestSealSpec(t *testing.T) {
	spec := &specs.Spec{
		Version: "1.2.0", Hostname: "canary-host", Annotations: map[string]string{"canary": "label"},
		Process: &specs.Process{Args: []string{"canary-argument"}, Env: []string{"E=canary-env"}},
		Linux:   &specs.Linux{CgroupsPath: "/canary", UIDMappings: []specs.LinuxIDMapping{{HostID: 7, Size: 1}}},
	}
	sealed, key, err := SealSpec(spec)
	if err != nil {
		t.Fatal(err)
	}
	data, err := json.Marshal(sealed)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(data), "canary") || sealed.Linux.UIDMappings[0].HostID != 7 {
		t.Errorf("sealed: %s", data)
	}
	plain, err := unsealSpec(data, key)
	if err != nil {
		t.Fatal(err)
	}
	got := new(specs.Spec)
	if err := json.Unmarshal(plain, got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(spec, got); diff != "" {
		t.Errorf("opened (-want +got):\n%s", diff)
	}
	_, another, err := SealSpec(spec)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := unsealSpec(data, another); err == nil {
		t.Error("another start's key opens it")
	}
	if _, err := unsealSpec(data, []byte("short")); err == nil {
		t.Error("a short key opens it")
	}
}

// FuzzUnsealSpec reads what containerd hands back.
func FuzzUnsealSpec(f *testing.F) {
	key := make([]byte, sealKeySize)
	f.Add([]byte(`{"annotations":{"dev.skep.sealed":"AAAA"}}`))
	f.Add([]byte(`{}`))
	f.Add([]byte(nil))
	f.Fuzz(func(t *testing.T, data []byte) {
		if plain, err := unsealSpec(data, key); err == nil {
			t.Errorf("forged: %q", plain)
		}
	})
}
