package e2e

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/skep-dev/skep/e2e/testimage"
)

// guestImages is where a guest has the archive of the tests' images.
const guestImages = "/skep/images.tar"

// guestTimeout bounds a guest on a machine that has other work: without acceleration it
// is some ten times slower than the machine. Beside two others the data plane's tests took
// 321 s there and the swarm's 219 s. Each has a bound of its own, at which it says what hangs;
// this one leaves a minute and a half to boot besides these.
const guestTimeout = guestBoot + guestDataplane + guestSwarmTest

// What guestTimeout consists of.
const (
	guestBoot      = 90 * time.Second
	guestDataplane = 7 * time.Minute
	guestSwarmTest = 5 * time.Minute
)

// TestGuestKernel runs the data plane's tests of encryption, and a swarm of daemons that encrypts
// by ESP, in a virtual machine whose kernel has WireGuard and ESP, as users' machines do and the
// machines of the tests may not.
func TestGuestKernel(t *testing.T) {
	if testing.Short() {
		t.Skip("boots a virtual machine")
	}
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip("needs qemu-system-x86_64: tools/deps.sh qemu-system-x86_64:qemu-system-x86")
	}
	if _, err := exec.LookPath("apt-get"); err != nil {
		t.Skip("needs apt-get to fetch Debian's kernel")
	}
	dir := t.TempDir()
	kernel, err := filepath.Abs("../bin/guest")
	if err != nil {
		t.Fatal(err)
	}
	run(t, "../tools/guest-kernel.sh", kernel)
	root := filepath.Join(dir, "root")
	guestRoot(t, root, kernel)
	guestSwarm(t, root)
	for _, p := range []guestProgram{
		{"dataplane", "../worker/dataplane", "-test.run ^(TestEncrypted|TestESP|TestSCTP) -test.timeout " + guestDataplane.String()},
		{"e2e", ".", "-test.run ^TestESP$ -test.timeout " + guestSwarmTest.String()},
	} {
		p.add(t, root)
	}
	image := filepath.Join(dir, "initrd")
	if err := writeInitrd(image, root); err != nil {
		t.Fatal(err)
	}
	out, err := try(t, guestTimeout, qemu, "-machine", "microvm,acpi=off", "-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", "2560",
		"-no-reboot", "-nographic", "-nodefaults", "-serial", "stdio", "-kernel", filepath.Join(kernel, "vmlinuz"), "-initrd", image,
		"-append", "console=ttyS0 reboot=t panic=-1 rdinit=/init quiet")
	out = strings.ReplaceAll(out, "\r", "")
	if err != nil || strings.Count(out, "guest: exit 0 of") != 2 {
		t.Fatalf("guest: %v\n%s", err, out)
	}
	for _, line := range regexp.MustCompile(`(?m)^(guest: |\s*--- |    (crypt|espcost)_test|\s+esp_test).*`).FindAllString(out, -1) {
		t.Log(line)
	}
	if strings.Contains(out, "--- SKIP") || !strings.Contains(out, "by the kernel's WireGuard") || !strings.Contains(out, "by the kernel's ESP") {
		t.Errorf("not what was to be tested:\n%s", out)
	}
}

// guestProgram is a package's tests with arguments.
type guestProgram struct{ name, dir, args string }

// add builds the program into a guest, which runs it after those that were added before.
func (p guestProgram) add(t *testing.T, root string) {
	t.Helper()
	home := filepath.Join(root, "skep", p.name)
	build := exec.CommandContext(t.Context(), "go", "test", "-c", "-ldflags", "-s -w", "-o", filepath.Join(home, "guest.test"), p.dir)
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	f, err := os.OpenFile(filepath.Join(root, "programs"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := fmt.Fprintf(f, "/skep/%s -test.v %s\n", p.name, p.args); err != nil {
		t.Fatal(err)
	}
}

// guestSwarm adds what a swarm of daemons needs: our programs, a runtime with its libraries, the
// docker client, and the images of the tests, which a guest cannot make.
func guestSwarm(t *testing.T, root string) {
	t.Helper()
	skepBinary(t)
	for _, name := range []string{"skep", "containerd", "containerd-shim-skep-v1", "skep-init"} {
		copyTree(t, filepath.Join("../bin", name), filepath.Join(root, "skep/bin", name))
	}
	for _, name := range []string{"crun", "docker"} {
		path, err := exec.LookPath(name)
		if err != nil {
			t.Fatal(err)
		}
		copyTree(t, path, filepath.Join(root, "bin", name))
		libraries, err := try(t, time.Minute, "ldd", path)
		if err != nil && !strings.Contains(libraries+err.Error(), "not a dynamic executable") {
			t.Fatal(err)
		}
		for _, library := range regexp.MustCompile(`/lib\S+`).FindAllString(libraries, -1) {
			copyTree(t, library, filepath.Join(root, library))
		}
	}
	if err := testimage.Write(t.Context(), filepath.Join(root, guestImages)); err != nil {
		t.Fatal(err)
	}
}

// guestRoot makes the files of a guest: a shell, and the kernel's modules for networks, ciphers
// and containers.
func guestRoot(t *testing.T, root, kernel string) {
	t.Helper()
	versions, err := os.ReadDir(filepath.Join(kernel, "modules"))
	if err != nil || len(versions) != 1 {
		t.Fatalf("modules of the guest's kernel: %v, %v", versions, err)
	}
	version := versions[0].Name()
	from, to := filepath.Join(kernel, "modules", version), filepath.Join(root, "lib/modules", version)
	for _, part := range []string{
		"kernel/net/bridge", "kernel/net/802", "kernel/net/llc", "kernel/net/core", "kernel/net/ipv4", "kernel/net/ipv6", "kernel/net/key", "kernel/net/netfilter",
		"kernel/net/packet", "kernel/net/sctp", "kernel/net/xfrm", "kernel/crypto", "kernel/arch/x86/crypto", "kernel/lib", "kernel/drivers/net/veth.ko",
		"kernel/drivers/net/vxlan", "kernel/drivers/net/wireguard", "kernel/drivers/net/tun.ko", "kernel/fs/overlayfs",
	} {
		copyTree(t, filepath.Join(from, part), filepath.Join(to, part))
	}
	for _, list := range []string{"modules.order", "modules.builtin", "modules.builtin.modinfo"} {
		copyTree(t, filepath.Join(from, list), filepath.Join(to, list))
	}
	for _, d := range []string{"proc", "sys", "dev", "tmp", "run", "var", "etc", "sbin", "root", "skep/bin", "skep/e2e", "skep/dataplane"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	copyTree(t, "/bin/busybox", filepath.Join(root, "bin/busybox"))
	copyTree(t, "guest/init", filepath.Join(root, "init"))
	for _, name := range []string{"bin/sh", "bin/mount", "bin/ip", "bin/uname", "bin/chroot", "bin/mkdir", "bin/cut", "sbin/reboot", "sbin/modprobe"} {
		if err := os.Symlink("/bin/busybox", filepath.Join(root, name)); err != nil {
			t.Fatal(err)
		}
	}
	run(t, "busybox", "depmod", "-b", root, version)
}

// copyTree copies a file, or a directory if it is there.
func copyTree(t *testing.T, from, to string) {
	t.Helper()
	err := filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		target := filepath.Join(to, rel)
		if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
			return err
		}
		info, err := os.Stat(path)
		if err != nil {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(target, data, info.Mode().Perm())
	})
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
}

// writeInitrd writes a directory as the kernel wants its first files: a "newc" archive.
func writeInitrd(file, root string) error {
	var b bytes.Buffer
	inode := 0
	entry := func(name string, mode uint32, data []byte) {
		inode++
		fmt.Fprintf(&b, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x", inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0)
		pad := func() { b.Write(make([]byte, (4-b.Len()%4)%4)) }
		b.WriteString(name + "\x00")
		pad()
		b.Write(data)
		pad()
	}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == root {
			return err
		}
		name, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		perm := uint32(info.Mode().Perm())
		switch {
		case d.IsDir():
			entry(name, 0o040000|perm, nil)
		case d.Type()&fs.ModeSymlink != 0:
			to, err := os.Readlink(path)
			if err != nil {
				return err
			}
			entry(name, 0o120777, []byte(to))
		default:
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			entry(name, 0o100000|perm, data)
		}
		return nil
	})
	if err != nil {
		return err
	}
	entry("TRAILER!!!", 0, nil)
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	z, err := gzip.NewWriterLevel(f, gzip.BestSpeed)
	if err != nil {
		return err
	}
	if _, err := io.Copy(z, &b); err != nil {
		return err
	}
	if err := z.Close(); err != nil {
		return err
	}
	return f.Close()
}
