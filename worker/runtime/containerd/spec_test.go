package containerd_test

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime"
)

// TestInside looks at what a container gets from within.
func TestInside(t *testing.T) {
	b := newBench(t, nil).withBusybox(t)
	hostDir := t.TempDir()
	if err := os.WriteFile(filepath.Join(hostDir, "f"), []byte("from the host\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	yes, umask := true, uint32(0o027)
	seccomp := "grep Seccomp: /proc/self/status | tr -d '\\t'"
	for _, c := range []struct {
		name   string
		script string
		cfg    container.Config
		host   container.HostConfig
		files  []runtime.File
		want   string
	}{
		{
			name: "environment", script: "echo $A $B $PATH", cfg: container.Config{Env: []string{"A=1", "B=two words"}},
			want: "1 two words /usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		},
		{name: "hostname", script: "echo $(hostname)=$(cat /etc/hostname)=$HOSTNAME", cfg: container.Config{Hostname: "hive"}, want: "hive=hive=hive"},
		{name: "domain name", script: "cat /proc/sys/kernel/domainname", cfg: container.Config{Domainname: "example.org"}, want: "example.org"},
		{name: "entrypoint", script: "x", cfg: container.Config{Entrypoint: []string{"echo", "entry"}}, want: "entry sh -c x"},
		{name: "working directory is made", script: "pwd", cfg: container.Config{WorkingDir: "/made/here"}, want: "/made/here"},
		{name: "user by name", script: "id -u; id -g; id -G", cfg: container.Config{User: "bee"}, want: "1234\n1235\n1235 1300"},
		{name: "user by number", script: "id -u; id -g", cfg: container.Config{User: "77:78"}, want: "77\n78"},
		{name: "additional groups", script: "id -G", cfg: container.Config{User: "bee"}, host: container.HostConfig{GroupAdd: []string{"extra", "5000"}}, want: "1235 1300 1400 5000"},
		{name: "user writes to its output", script: "echo x > /dev/stdout", cfg: container.Config{User: "bee"}, want: "x"},
		{name: "umask", script: "umask", host: container.HostConfig{Umask: &umask}, want: "0027"},
		{name: "read-only root", script: "touch /x 2>/dev/null || echo refused", host: container.HostConfig{ReadonlyRootfs: true}, want: "refused"},
		{name: "bind", script: "cat /m/f; echo y > /m/g; cat /m/g", host: container.HostConfig{Mounts: []mount.Mount{{Type: mount.TypeBind, Source: hostDir, Target: "/m"}}}, want: "from the host\ny"},
		{name: "read-only bind", script: "touch /m/g 2>/dev/null || echo refused", host: container.HostConfig{Mounts: []mount.Mount{{Type: mount.TypeBind, Source: hostDir, Target: "/m", ReadOnly: true}}}, want: "refused"},
		{name: "legacy bind", script: "cat /m/f; touch /m/h 2>/dev/null || echo refused", host: container.HostConfig{Binds: []string{hostDir + ":/m:ro"}}, want: "from the host\nrefused"},
		{name: "shared bind", script: "grep -c ' /m .*shared:' /proc/self/mountinfo", host: container.HostConfig{Mounts: []mount.Mount{{Type: mount.TypeBind, Source: hostDir, Target: "/m", BindOptions: &mount.BindOptions{Propagation: mount.PropagationRShared}}}}, want: "1"},
		{name: "file bind", script: "cat /one", host: container.HostConfig{Mounts: []mount.Mount{{Type: mount.TypeBind, Source: hostDir + "/f", Target: "/one", ReadOnly: true}}}, want: "from the host"},
		{name: "tmpfs", script: "df -k /t | awk 'NR==2{print $1,$2}'; stat -c %a /t", host: container.HostConfig{Mounts: []mount.Mount{{Type: mount.TypeTmpfs, Target: "/t", TmpfsOptions: &mount.TmpfsOptions{SizeBytes: 1 << 20, Mode: 0o1770}}}}, want: "tmpfs 1024\n1770"},
		{name: "legacy tmpfs", script: "df -k /t | awk 'NR==2{print $1,$2}'", host: container.HostConfig{Tmpfs: map[string]string{"/t": "size=2m"}}, want: "tmpfs 2048"},
		{name: "shm size", script: "df -k /dev/shm | awk 'NR==2{print $2}'", host: container.HostConfig{ShmSize: 1 << 20}, want: "1024"},
		{name: "new volume is filled from the image", script: "cat /data/seed; stat -c '%u %g %a' /data/seed", host: container.HostConfig{Mounts: []mount.Mount{{Type: mount.TypeVolume, Source: "seeded", Target: "/data"}}}, want: "from the image\n1234 1235 640"},
		{name: "volume without copy", script: "ls /data | wc -l", host: container.HostConfig{Mounts: []mount.Mount{{Type: mount.TypeVolume, Source: "bare", Target: "/data", VolumeOptions: &mount.VolumeOptions{NoCopy: true}}}}, want: "0"},
		{name: "capabilities dropped", script: "grep CapEff /proc/self/status | tr -d '\\t'", host: container.HostConfig{CapDrop: []string{"ALL"}, CapAdd: []string{"NET_BIND_SERVICE"}}, want: "CapEff:0000000000000400"},
		{name: "default capabilities", script: "grep CapEff /proc/self/status | tr -d '\\t'", want: "CapEff:00000000a80425fb"},
		{name: "no capabilities for users", script: "grep -E 'CapEff|CapBnd' /proc/self/status | tr -d '\\t'", cfg: container.Config{User: "bee"}, want: "CapEff:0000000000000000\nCapBnd:00000000a80425fb"},
		{name: "default seccomp", script: seccomp, want: "Seccomp:2"},
		{name: "seccomp unconfined", script: seccomp, host: container.HostConfig{SecurityOpt: []string{"seccomp=unconfined"}}, want: "Seccomp:0"},
		{name: "custom seccomp", script: "mkdir /d 2>/dev/null || echo refused", host: container.HostConfig{SecurityOpt: []string{`seccomp={"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO"}]}`}}, want: "refused"},
		{name: "no new privileges", script: "grep NoNewPrivs /proc/self/status | tr -d '\\t'", host: container.HostConfig{SecurityOpt: []string{"no-new-privileges"}}, want: "NoNewPrivs:1"},
		{name: "masked paths", script: "wc -c < /proc/interrupts; touch /proc/sys/x 2>/dev/null || echo refused", want: "0\nrefused"},
		{name: "privileged", script: seccomp + "; test -e /dev/kmsg && echo devices", host: container.HostConfig{Privileged: true}, want: "Seccomp:0\ndevices"},
		{name: "sysctl", script: "cat /proc/sys/net/core/somaxconn", host: container.HostConfig{Sysctls: map[string]string{"net.core.somaxconn": "77"}}, want: "77"},
		{name: "ulimit", script: "ulimit -n; ulimit -Hn", host: container.HostConfig{Resources: container.Resources{Ulimits: []*container.Ulimit{{Name: "nofile", Soft: 100, Hard: 200}}}}, want: "100\n200"},
		{name: "oom score", script: "cat /proc/self/oom_score_adj", host: container.HostConfig{OomScoreAdj: 500}, want: "500"},
		{name: "init", script: "cat /proc/1/comm", host: container.HostConfig{Init: &yes}, want: "docker-init"},
		{name: "device", script: "test -c /dev/mynull && echo there", host: container.HostConfig{Resources: container.Resources{Devices: []container.DeviceMapping{{PathOnHost: "/dev/null", PathInContainer: "/dev/mynull", CgroupPermissions: "rw"}}}}, want: "there"},
		{name: "extra hosts", script: "grep bees /etc/hosts | tr '\\t' ' '", host: container.HostConfig{ExtraHosts: []string{"bees:10.9.8.7"}}, want: "10.9.8.7 bees"},
		{name: "dns", script: "cat /etc/resolv.conf", host: container.HostConfig{DNS: []netip.Addr{netip.MustParseAddr("9.9.9.9")}, DNSSearch: []string{"example.org"}, DNSOptions: []string{"ndots:2"}}, want: "nameserver 9.9.9.9\nsearch example.org\noptions ndots:2"},
		{name: "host network", script: "readlink /proc/self/ns/net", host: container.HostConfig{NetworkMode: "host"}, want: link(t, "/proc/self/ns/net")},
		{name: "host pids", script: "readlink /proc/self/ns/pid", host: container.HostConfig{PidMode: "host"}, want: link(t, "/proc/self/ns/pid")},
		{name: "own network", script: "ls /sys/class/net", want: "lo"},
		{
			name: "secrets and configs", script: "cat /run/secrets/key; stat -c '%a %u %g' /run/secrets/key; cat /etc/app.conf; cat /run/secrets/sub/key; touch /run/secrets/x 2>/dev/null || echo refused; grep -c -e '/run/secrets .* tmpfs' -e '/run/secrets .* ramfs' /proc/self/mountinfo",
			files: []runtime.File{{Path: "key", Mode: 0o440, UID: 3, GID: 4, Data: []byte("s3cret\n")}, {Path: "/etc/app.conf", Mode: 0o444, Data: []byte("conf\n")}, {Path: "sub/key", Mode: 0o400, Data: []byte("deep\n")}},
			want:  "s3cret\n440 3 4\nconf\ndeep\nrefused\n1",
		},
		{name: "memory limit", script: "cat /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null || cat /sys/fs/cgroup/memory.max", host: container.HostConfig{Resources: container.Resources{Memory: 32 << 20}}, want: "33554432"},
		{name: "pids limit", script: "cat /sys/fs/cgroup/pids/pids.max 2>/dev/null || cat /sys/fs/cgroup/pids.max", host: container.HostConfig{Resources: container.Resources{PidsLimit: new(int64(77))}}, want: "77"},
		{name: "cpu limit", script: "cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us 2>/dev/null || cat /sys/fs/cgroup/cpu.max", host: container.HostConfig{Resources: container.Resources{NanoCPUs: 5e8}}, want: "50000"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if d := cmp.Diff(c.want, b.output(t, c.script, c.cfg, c.host, c.files...)); d != "" {
				t.Error(d)
			}
		})
	}
}

func link(t *testing.T, path string) string {
	t.Helper()
	s, err := os.Readlink(path)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestRefusals holds what must not be accepted and ignored.
func TestRefusals(t *testing.T) {
	b := newBench(t, nil).withBusybox(t)
	for _, c := range []struct {
		name string
		cfg  container.Config
		host container.HostConfig
		kind model.Kind
		text string
	}{
		{"no image", container.Config{Image: "absent:1"}, container.HostConfig{}, model.NotFound, "No such image: absent:1"},
		{"bind source", container.Config{}, container.HostConfig{Mounts: []mount.Mount{{Type: mount.TypeBind, Source: "/not/there", Target: "/x"}}}, model.Invalid, "bind source path does not exist: /not/there"},
		{"twice", container.Config{}, container.HostConfig{Tmpfs: map[string]string{"/x": ""}, Mounts: []mount.Mount{{Type: mount.TypeTmpfs, Target: "/x"}}}, model.Invalid, "Duplicate mount point: /x"},
		{"image mount", container.Config{}, container.HostConfig{Mounts: []mount.Mount{{Type: mount.TypeImage, Source: "busybox", Target: "/x"}}}, model.Unimplemented, "image"},
		{"log driver", container.Config{}, container.HostConfig{LogConfig: container.LogConfig{Type: "splunk"}}, model.Invalid, "no log driver named 'splunk' is registered"},
		{"log option", container.Config{}, container.HostConfig{LogConfig: container.LogConfig{Config: map[string]string{"x": "y"}}}, model.Invalid, "unknown log opt 'x'"},
		{"capability", container.Config{}, container.HostConfig{CapAdd: []string{"FLY"}}, model.Invalid, "invalid capability"},
		{"security", container.Config{}, container.HostConfig{SecurityOpt: []string{"what=ever"}}, model.Invalid, "invalid --security-opt"},
		{"memory", container.Config{}, container.HostConfig{Resources: container.Resources{Memory: 1 << 20}}, model.Invalid, "Minimum memory limit"},
		{"network", container.Config{}, container.HostConfig{NetworkMode: "mynet"}, model.NotFound, "network mynet not found"},
		{"volume driver", container.Config{}, container.HostConfig{Mounts: []mount.Mount{{Type: mount.TypeVolume, Source: "vv", Target: "/x", VolumeOptions: &mount.VolumeOptions{DriverConfig: &mount.Driver{Name: "nfs"}}}}}, model.NotFound, "plugin"},
		{"stop signal", container.Config{StopSignal: "SIGNOPE"}, container.HostConfig{}, model.Invalid, "invalid signal"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.cfg.Image == "" {
				c.cfg.Image = "busybox"
			}
			_, _, err := b.Create(t.Context(), runtime.CreateOptions{Config: &c.cfg, HostConfig: &c.host})
			if model.KindOf(err) != c.kind || !strings.Contains(err.Error(), c.text) {
				t.Errorf("error %v", err)
			}
		})
	}
	if list, err := b.List(t.Context()); err != nil || len(list) != 0 {
		t.Errorf("%d containers left, %v", len(list), err)
	}
	for _, c := range []struct {
		name string
		cfg  container.Config
		code int
	}{
		{"program that is not there", container.Config{Cmd: []string{"/nope"}}, 127},
		{"program that is a directory", container.Config{Cmd: []string{"/etc"}}, 126},
	} {
		t.Run(c.name, func(t *testing.T) {
			id := b.create(t, &c.cfg, nil)
			if err := b.Start(t.Context(), id); err == nil {
				t.Fatal("started")
			}
			got, err := b.Inspect(t.Context(), id)
			if err != nil || got.State.ExitCode != c.code || got.State.Error == "" || got.State.Status != container.StateCreated {
				t.Errorf("%+v, %v", got.State, err)
			}
		})
	}
}
