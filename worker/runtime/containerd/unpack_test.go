package containerd

import (
	"archive/tar"
	"bytes"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/google/go-cmp/cmp"
)

// FuzzUnpack: whatever an archive says, it changes nothing outside of where it is unpacked.
func FuzzUnpack(f *testing.F) {
	for _, list := range [][]tar.Header{
		{{Name: "a", Typeflag: tar.TypeReg}, {Name: "d/", Typeflag: tar.TypeDir, Mode: 0o700}, {Name: "d/f", Typeflag: tar.TypeReg, Mode: 0o4755}},
		{{Name: "../outside", Typeflag: tar.TypeReg}, {Name: "/../../outside", Typeflag: tar.TypeReg}},
		{{Name: "up", Typeflag: tar.TypeSymlink, Linkname: ".."}, {Name: "up/outside", Typeflag: tar.TypeReg}, {Name: "up/new", Typeflag: tar.TypeDir}},
		{{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "../outside"}, {Name: "l", Typeflag: tar.TypeReg}},
		{{Name: "h", Typeflag: tar.TypeLink, Linkname: "../outside"}, {Name: "h", Typeflag: tar.TypeReg}},
		{{Name: "d/", Typeflag: tar.TypeDir}, {Name: "d", Typeflag: tar.TypeSymlink, Linkname: "/"}},
		{{Name: "p", Typeflag: tar.TypeFifo}, {Name: "p/x", Typeflag: tar.TypeReg}, {Name: ".", Typeflag: tar.TypeDir}},
	} {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, h := range list {
			h.ModTime = time.Unix(1e9, 0)
			data := "content"
			if h.Typeflag != tar.TypeReg {
				data = ""
			}
			h.Size = int64(len(data))
			if err := w.WriteHeader(&h); err != nil {
				f.Fatal(err)
			}
			if _, err := io.WriteString(w, data); err != nil {
				f.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			f.Fatal(err)
		}
		f.Add(b.Bytes(), false)
		f.Add(b.Bytes(), true)
	}
	f.Add([]byte("no archive"), true)
	f.Fuzz(func(t *testing.T, archive []byte, keepKind bool) {
		if tooMuch(archive) {
			return
		}
		dir := t.TempDir()
		outside := filepath.Join(dir, "outside")
		if err := os.WriteFile(outside, []byte("of others"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(filepath.Join(dir, "in"), 0o700); err != nil {
			t.Fatal(err)
		}
		before := look(t, dir)
		root, err := os.OpenRoot(filepath.Join(dir, "in"))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = root.Close() }()
		u := unpacker{root: root, keepKind: keepKind}
		_ = u.unpack(t.Context(), bytes.NewReader(archive)) // most archives of a fuzzer are broken
		if d := cmp.Diff(before, look(t, dir)); d != "" {
			t.Error(d)
		}
	})
}

// tooMuch reports whether an archive would fill the disk: a sparse file is written in full.
func tooMuch(archive []byte) bool {
	in, err := compression.DecompressStream(bytes.NewReader(archive))
	if err != nil {
		return false
	}
	defer func() { _ = in.Close() }()
	total := int64(0)
	for r := tar.NewReader(io.LimitReader(in, 1<<20)); ; {
		h, err := r.Next()
		if err != nil {
			return false
		}
		if total += h.Size; h.Size > 1<<20 || total > 1<<20 {
			return true
		}
	}
}

// look describes a directory but for what "in" holds.
func look(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, x := range entries {
		line := x.Name()
		if line != "in" {
			info, err := x.Info()
			if err != nil {
				t.Fatal(err)
			}
			data, err := os.ReadFile(filepath.Join(dir, x.Name()))
			if err != nil {
				t.Fatal(err)
			}
			line = strings.Join([]string{line, info.Mode().String(), info.ModTime().String(), string(data)}, " ")
		}
		out = append(out, line)
	}
	slices.Sort(out)
	return out
}
