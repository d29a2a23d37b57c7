package containerd

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestMemoryWithoutNoswap has what kernels before 6.4 have.
func TestMemoryWithoutNoswap(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to mount")
	}
	dir := t.TempDir()
	if err := mountRAM(dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	if !inMemory(dir) || inMemory(filepath.Dir(dir)) {
		t.Errorf("%s in memory: %v, its parent: %v", dir, inMemory(dir), inMemory(filepath.Dir(dir)))
	}
}
