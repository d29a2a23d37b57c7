package containerd

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// bpfAnnotation gives crun a compiled filter, which saves it more than half of a start.
const bpfAnnotation = "run.oci.seccomp_bpf_data"

// keyAnnotation remembers a specification's filter key between annotate and harvest.
const keyAnnotation = "dev.skep.seccomp"

// filterCache keeps compiled seccomp filters. crun compiles a profile when it first meets
// it and leaves the filter in its state; later containers of the profile are given it.
// The profile stays in the specification, for runtimes that do not know the annotation.
type filterCache struct {
	dir    string
	salt   string // what a filter depends on beside the profile
	usable bool

	mu    sync.Mutex
	known map[string]string // base64 by key; empty is being looked for
}

func newFilterCache(dir string, r ociRuntime) *filterCache {
	var u unix.Utsname
	release := ""
	if unix.Uname(&u) == nil {
		release = unix.ByteSliceToString(u.Release[:])
	}
	info, err := os.Stat(r.path)
	salt := r.version + "|" + release
	if err == nil {
		salt += fmt.Sprintf("|%d|%d", info.Size(), info.ModTime().UnixNano())
	}
	return &filterCache{dir: dir, salt: salt, usable: r.name == "crun", known: map[string]string{}}
}

// annotate adds the compiled filter to a specification if it is known.
func (f *filterCache) annotate(spec *specs.Spec) {
	if !f.usable || spec.Linux.Seccomp == nil {
		return
	}
	b, err := json.Marshal(spec.Linux.Seccomp)
	if err != nil {
		return // without the cache it works too
	}
	sum := sha256.Sum256(append(b, f.salt...))
	key := hex.EncodeToString(sum[:])
	if spec.Annotations == nil {
		spec.Annotations = map[string]string{}
	}
	spec.Annotations[keyAnnotation] = key
	f.mu.Lock()
	data, ok := f.known[key]
	f.mu.Unlock()
	if !ok {
		if b, err := os.ReadFile(filepath.Join(f.dir, key)); err == nil && validFilter(b) {
			data = base64.StdEncoding.EncodeToString(b)
			f.set(key, data)
		}
	}
	if data != "" {
		spec.Annotations[bpfAnnotation] = data
	}
}

// harvest keeps the filter that crun compiled for a container it has just created.
func (f *filterCache) harvest(spec *specs.Spec, path string) error {
	key := spec.Annotations[keyAnnotation]
	if !f.usable || key == "" || spec.Annotations[bpfAnnotation] != "" {
		return nil
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("read compiled seccomp filter: %w", err)
	}
	if !validFilter(b) {
		return fmt.Errorf("compiled seccomp filter of %d bytes is malformed", len(b))
	}
	f.set(key, base64.StdEncoding.EncodeToString(b))
	if err := os.MkdirAll(f.dir, 0o700); err != nil {
		return fmt.Errorf("keep compiled seccomp filter: %w", err)
	}
	tmp := filepath.Join(f.dir, "."+key)
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return fmt.Errorf("keep compiled seccomp filter: %w", err)
	}
	if err := os.Rename(tmp, filepath.Join(f.dir, key)); err != nil {
		return fmt.Errorf("keep compiled seccomp filter: %w", err)
	}
	return nil
}

func (f *filterCache) set(key, data string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.known[key] = data
}

// validFilter reports whether b can be a BPF program: whole instructions, at most as many
// as the kernel takes.
func validFilter(b []byte) bool {
	const instruction, most = 8, 4096
	return len(b) > 0 && len(b)%instruction == 0 && len(b)/instruction <= most
}
