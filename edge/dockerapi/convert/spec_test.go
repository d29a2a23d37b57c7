package convert_test

import (
	"encoding/json"
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/swarm"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/edge/dockerapi/convert"
)

var rewrite = flag.Bool("rewrite", false, "rewrite golden files")

// golden compares got with a file, or writes it.
func golden(t *testing.T, path string, got []byte) {
	t.Helper()
	if *rewrite {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("%s: %s", path, diff)
	}
}

// TestServiceSpecGolden stores each testdata/*.in.json and shows what a client reads
// back, so that a reader of the files sees every default and every change of form.
func TestServiceSpecGolden(t *testing.T) {
	files, err := filepath.Glob("testdata/*.in.json")
	if err != nil || len(files) == 0 {
		t.Fatal("no files", err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			in, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			var spec swarm.ServiceSpec
			if err := json.Unmarshal(in, &spec); err != nil {
				t.Fatal(err)
			}
			stored, err := convert.StoreServiceSpec(spec, nil)
			if err != nil {
				t.Fatal(err)
			}
			out, err := json.MarshalIndent(convert.DockerServiceSpec(stored), "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			golden(t, strings.Replace(file, ".in.json", ".out.json", 1), append(out, '\n'))
			again, err := convert.StoreServiceSpec(convert.DockerServiceSpec(stored), nil)
			if err != nil || !proto.Equal(stored, again) {
				t.Errorf("what is read and stored again differs: %v", err)
			}
		})
	}
}

func TestRefusals(t *testing.T) {
	with := func(edit func(*swarm.ServiceSpec)) swarm.ServiceSpec {
		s := swarm.ServiceSpec{TaskTemplate: swarm.TaskSpec{ContainerSpec: &swarm.ContainerSpec{Image: "x"}}}
		edit(&s)
		return s
	}
	tests := []struct {
		text string
		kind model.Kind
		edit func(*swarm.ServiceSpec)
	}{
		{"mismatched Runtime and *Spec fields", model.Invalid, func(s *swarm.ServiceSpec) { s.TaskTemplate.ContainerSpec = nil }},
		{"mismatched Runtime and *Spec fields", model.Invalid, func(s *swarm.ServiceSpec) { s.TaskTemplate.PluginSpec = new(swarm.RuntimeSpec) }},
		{"unsupported runtime", model.Invalid, func(s *swarm.ServiceSpec) { s.TaskTemplate.Runtime = swarm.RuntimeNetworkAttachment }},
		{`runtime type "plugin" only supported in experimental`, model.Internal, func(s *swarm.ServiceSpec) { s.TaskTemplate.Runtime = swarm.RuntimePlugin }},
		{`invalid MountType: "foo"`, model.Invalid, func(s *swarm.ServiceSpec) { s.TaskTemplate.ContainerSpec.Mounts = []mount.Mount{{Type: "foo"}} }},
		{`invalid MountPropagation: "foo"`, model.Invalid, func(s *swarm.ServiceSpec) {
			s.TaskTemplate.ContainerSpec.Mounts = []mount.Mount{{BindOptions: &mount.BindOptions{Propagation: "foo"}}}
		}},
		{"must specify only one service mode", model.Invalid, func(s *swarm.ServiceSpec) {
			s.Mode.Global, s.Mode.Replicated = new(swarm.GlobalService), new(swarm.ReplicatedService)
		}},
		{`invalid resolution mode: "foo"`, model.Invalid, func(s *swarm.ServiceSpec) { s.EndpointSpec = &swarm.EndpointSpec{Mode: "foo"} }},
		{"memory swap provided, but no memory-limit was set", model.Invalid, func(s *swarm.ServiceSpec) {
			s.TaskTemplate.Resources = &swarm.ResourceRequirements{SwapBytes: new(int64(1))}
		}},
		{`invalid RestartCondition: "foo"`, model.Invalid, func(s *swarm.ServiceSpec) { s.TaskTemplate.RestartPolicy = &swarm.RestartPolicy{Condition: "foo"} }},
		{"unrecognized update failure action foo", model.Invalid, func(s *swarm.ServiceSpec) { s.UpdateConfig = &swarm.UpdateConfig{FailureAction: "foo"} }},
		{"unrecognized update order foo", model.Invalid, func(s *swarm.ServiceSpec) { s.RollbackConfig = &swarm.UpdateConfig{Order: "foo"} }},
		{"invalid Config: either File or Runtime should be set", model.Invalid, func(s *swarm.ServiceSpec) { s.TaskTemplate.ContainerSpec.Configs = []*swarm.ConfigReference{{}} }},
		{"invalid Config: cannot specify both File and Runtime", model.Invalid, func(s *swarm.ServiceSpec) {
			s.TaskTemplate.ContainerSpec.Configs = []*swarm.ConfigReference{{File: new(swarm.ConfigReferenceFileTarget), Runtime: new(swarm.ConfigReferenceRuntimeTarget)}}
		}},
		{`invalid Isolation: "hyperv"`, model.Invalid, func(s *swarm.ServiceSpec) { s.TaskTemplate.ContainerSpec.Isolation = "hyperv" }},
	}
	for _, tt := range tests {
		_, err := convert.StoreServiceSpec(with(tt.edit), nil)
		if err == nil || err.Error() != tt.text || model.KindOf(err) != tt.kind {
			t.Errorf("got %v, want %s", err, tt.text)
		}
	}
	for text, spec := range map[string]swarm.NodeSpec{`invalid Role: "foo"`: {Role: "foo"}, `invalid Availability: "foo"`: {Availability: "foo"}} {
		if _, err := convert.StoreNodeSpec(spec); err == nil || err.Error() != text {
			t.Errorf("got %v, want %s", err, text)
		}
	}
	if _, err := convert.StoreClusterSpec(swarm.Spec{Annotations: swarm.Annotations{Name: "other"}}); err == nil || err.Error() != `swarm spec must be named "default"` {
		t.Errorf("cluster name: %v", err)
	}
}

// Generators of specs as clients send them, with every default written out, so that
// what is read must equal what was sent.

func word(t *rapid.T, what string) string { return rapid.StringMatching(`[a-z]{1,8}`).Draw(t, what) }

func maybe[T any](t *rapid.T, what string, draw func(*rapid.T) T) *T {
	if !rapid.Bool().Draw(t, what+"?") {
		return nil
	}
	return new(draw(t))
}

func list[T any](t *rapid.T, what string, draw func(*rapid.T) T) []T {
	n := rapid.IntRange(0, 3).Draw(t, what+" length")
	if n == 0 {
		return nil
	}
	out := make([]T, n)
	for i := range out {
		out[i] = draw(t)
	}
	return out
}

func words(t *rapid.T, what string) []string {
	return list(t, what, func(t *rapid.T) string { return word(t, what) })
}

func dict(t *rapid.T, what string) map[string]string {
	m := rapid.MapOfN(rapid.StringMatching(`[a-z.]{1,6}`), rapid.StringMatching(`[a-z]{0,6}`), 0, 3).Draw(t, what)
	if len(m) == 0 {
		return nil
	}
	return m
}

func span(t *rapid.T) time.Duration {
	return time.Duration(rapid.Int64Range(0, 1e12).Draw(t, "duration"))
}

func small(t *rapid.T) int64 { return rapid.Int64Range(1, 1<<40).Draw(t, "amount") }

func drawMount(t *rapid.T) mount.Mount {
	m := mount.Mount{Target: word(t, "target"), Source: word(t, "source"), ReadOnly: rapid.Bool().Draw(t, "ro")}
	m.Type = rapid.SampledFrom([]mount.Type{mount.TypeBind, mount.TypeVolume, mount.TypeTmpfs}).Draw(t, "type")
	switch m.Type {
	case mount.TypeBind:
		m.BindOptions = maybe(t, "bind", func(t *rapid.T) mount.BindOptions {
			return mount.BindOptions{
				Propagation: rapid.SampledFrom(mount.Propagations).Draw(t, "propagation"), NonRecursive: rapid.Bool().Draw(t, "nr"),
				CreateMountpoint: rapid.Bool().Draw(t, "cm"), ReadOnlyForceRecursive: rapid.Bool().Draw(t, "rofr"),
			}
		})
	case mount.TypeVolume:
		m.VolumeOptions = maybe(t, "volume", func(t *rapid.T) mount.VolumeOptions {
			return mount.VolumeOptions{
				NoCopy: rapid.Bool().Draw(t, "nc"), Labels: dict(t, "labels"), Subpath: word(t, "subpath"),
				DriverConfig: maybe(t, "driver", func(t *rapid.T) mount.Driver { return mount.Driver{Name: word(t, "name"), Options: dict(t, "options")} }),
			}
		})
	default:
		m.TmpfsOptions = maybe(t, "tmpfs", func(t *rapid.T) mount.TmpfsOptions {
			return mount.TmpfsOptions{
				SizeBytes: small(t), Mode: os.FileMode(rapid.IntRange(0, 0o777).Draw(t, "mode")),
				Options: list(t, "options", func(t *rapid.T) []string { return []string{word(t, "key"), word(t, "value")} }),
			}
		})
	}
	return m
}

func drawContainer(t *rapid.T) swarm.ContainerSpec {
	return swarm.ContainerSpec{
		Image: word(t, "image"), Labels: dict(t, "labels"), Command: words(t, "command"), Args: words(t, "args"), Hostname: word(t, "hostname"),
		Env: words(t, "env"), Dir: word(t, "dir"), User: word(t, "user"), Groups: words(t, "groups"), StopSignal: word(t, "signal"),
		TTY: rapid.Bool().Draw(t, "tty"), OpenStdin: rapid.Bool().Draw(t, "stdin"), ReadOnly: rapid.Bool().Draw(t, "readonly"),
		Init: maybe(t, "init", func(t *rapid.T) bool { return rapid.Bool().Draw(t, "init") }), StopGracePeriod: maybe(t, "grace", span),
		Mounts: list(t, "mounts", drawMount), Hosts: words(t, "hosts"), Isolation: container.IsolationDefault, Sysctls: dict(t, "sysctls"),
		CapabilityAdd: words(t, "add"), CapabilityDrop: words(t, "drop"), OomScoreAdj: rapid.Int64Range(-1000, 1000).Draw(t, "oom"),
		Healthcheck: maybe(t, "health", func(t *rapid.T) container.HealthConfig {
			return container.HealthConfig{Test: words(t, "test"), Interval: span(t), Timeout: span(t), StartPeriod: span(t), StartInterval: span(t), Retries: rapid.IntRange(0, 9).Draw(t, "retries")}
		}),
		DNSConfig: maybe(t, "dns", func(t *rapid.T) swarm.DNSConfig {
			return swarm.DNSConfig{Search: words(t, "search"), Options: words(t, "options"), Nameservers: list(t, "nameservers", func(t *rapid.T) netip.Addr {
				return netip.AddrFrom4([4]byte(rapid.SliceOfN(rapid.Byte(), 4, 4).Draw(t, "address")))
			})}
		}),
		Ulimits: list(t, "ulimits", func(t *rapid.T) *container.Ulimit {
			return &container.Ulimit{Name: word(t, "name"), Soft: small(t), Hard: small(t)}
		}),
		Secrets: list(t, "secrets", func(t *rapid.T) *swarm.SecretReference {
			return &swarm.SecretReference{SecretID: word(t, "id"), SecretName: word(t, "name"), File: &swarm.SecretReferenceFileTarget{Name: word(t, "file"), UID: "1", GID: "2", Mode: 0o444}}
		}),
		Configs: list(t, "configs", func(t *rapid.T) *swarm.ConfigReference {
			return &swarm.ConfigReference{ConfigID: word(t, "id"), ConfigName: word(t, "name"), Runtime: new(swarm.ConfigReferenceRuntimeTarget)}
		}),
		Privileges: maybe(t, "privileges", func(t *rapid.T) swarm.Privileges {
			return swarm.Privileges{
				NoNewPrivileges: rapid.Bool().Draw(t, "nnp"),
				SELinuxContext: maybe(t, "selinux", func(t *rapid.T) swarm.SELinuxContext {
					return swarm.SELinuxContext{User: word(t, "user"), Disable: true}
				}),
				CredentialSpec: maybe(t, "credentials", func(t *rapid.T) swarm.CredentialSpec { return swarm.CredentialSpec{File: word(t, "file")} }),
				Seccomp: maybe(t, "seccomp", func(t *rapid.T) swarm.SeccompOpts {
					return swarm.SeccompOpts{Mode: rapid.SampledFrom([]swarm.SeccompMode{"default", "unconfined", "custom"}).Draw(t, "mode"), Profile: []byte(word(t, "profile"))}
				}),
				AppArmor: maybe(t, "apparmor", func(t *rapid.T) swarm.AppArmorOpts {
					return swarm.AppArmorOpts{Mode: rapid.SampledFrom([]swarm.AppArmorMode{"default", "disabled"}).Draw(t, "mode")}
				}),
			}
		}),
	}
}

func drawUpdate(t *rapid.T) swarm.UpdateConfig {
	return swarm.UpdateConfig{
		Parallelism: rapid.Uint64Range(0, 9).Draw(t, "parallelism"), Delay: span(t), Monitor: span(t),
		FailureAction:   rapid.SampledFrom([]swarm.FailureAction{"pause", "continue", "rollback"}).Draw(t, "action"),
		MaxFailureRatio: rapid.Float32Range(0, 1).Draw(t, "ratio"),
		Order:           rapid.SampledFrom([]swarm.UpdateOrder{"stop-first", "start-first"}).Draw(t, "order"),
	}
}

func drawMode(t *rapid.T) swarm.ServiceMode {
	n := func() *uint64 { return new(rapid.Uint64Range(0, 99).Draw(t, "count")) }
	switch rapid.IntRange(0, 3).Draw(t, "mode") {
	case 0:
		return swarm.ServiceMode{Replicated: &swarm.ReplicatedService{Replicas: n()}}
	case 1:
		return swarm.ServiceMode{Global: new(swarm.GlobalService)}
	case 2:
		return swarm.ServiceMode{ReplicatedJob: &swarm.ReplicatedJob{MaxConcurrent: n(), TotalCompletions: n()}}
	default:
		return swarm.ServiceMode{GlobalJob: new(swarm.GlobalJob)}
	}
}

func drawTask(t *rapid.T) swarm.TaskSpec {
	return swarm.TaskSpec{
		ContainerSpec: new(drawContainer(t)), Runtime: swarm.RuntimeContainer, ForceUpdate: rapid.Uint64Range(0, 9).Draw(t, "force"),
		Resources: maybe(t, "resources", func(t *rapid.T) swarm.ResourceRequirements {
			r := swarm.ResourceRequirements{
				Limits: maybe(t, "limits", func(t *rapid.T) swarm.Limit {
					return swarm.Limit{NanoCPUs: small(t), MemoryBytes: small(t), Pids: small(t)}
				}),
				Reservations: maybe(t, "reservations", func(t *rapid.T) swarm.Resources {
					return swarm.Resources{NanoCPUs: small(t), MemoryBytes: small(t), GenericResources: list(t, "generic", func(t *rapid.T) swarm.GenericResource {
						if rapid.Bool().Draw(t, "named") {
							return swarm.GenericResource{NamedResourceSpec: &swarm.NamedGenericResource{Kind: word(t, "kind"), Value: word(t, "value")}}
						}
						return swarm.GenericResource{DiscreteResourceSpec: &swarm.DiscreteGenericResource{Kind: word(t, "kind"), Value: small(t)}}
					})}
				}),
				MemorySwappiness: maybe(t, "swappiness", small),
			}
			if r.Limits != nil {
				r.SwapBytes = maybe(t, "swap", small)
			}
			return r
		}),
		RestartPolicy: maybe(t, "restart", func(t *rapid.T) swarm.RestartPolicy {
			return swarm.RestartPolicy{
				Condition: rapid.SampledFrom([]swarm.RestartPolicyCondition{"none", "on-failure", "any"}).Draw(t, "condition"),
				Delay:     maybe(t, "delay", span), Window: maybe(t, "window", span), MaxAttempts: new(rapid.Uint64Range(0, 9).Draw(t, "attempts")),
			}
		}),
		Placement: maybe(t, "placement", func(t *rapid.T) swarm.Placement {
			return swarm.Placement{
				Constraints: words(t, "constraints"), MaxReplicas: rapid.Uint64Range(0, 9).Draw(t, "max"),
				Preferences: list(t, "preferences", func(t *rapid.T) swarm.PlacementPreference {
					return swarm.PlacementPreference{Spread: &swarm.SpreadOver{SpreadDescriptor: word(t, "descriptor")}}
				}),
				Platforms: list(t, "platforms", func(t *rapid.T) swarm.Platform { return swarm.Platform{Architecture: word(t, "arch"), OS: "linux"} }),
			}
		}),
		Networks: list(t, "networks", func(t *rapid.T) swarm.NetworkAttachmentConfig {
			return swarm.NetworkAttachmentConfig{Target: word(t, "target"), Aliases: words(t, "aliases"), DriverOpts: dict(t, "options")}
		}),
		LogDriver: maybe(t, "log", func(t *rapid.T) swarm.Driver { return swarm.Driver{Name: word(t, "name"), Options: dict(t, "options")} }),
	}
}

func drawSpec(t *rapid.T) swarm.ServiceSpec {
	s := swarm.ServiceSpec{
		Annotations: swarm.Annotations{Name: word(t, "name"), Labels: dict(t, "labels")}, TaskTemplate: drawTask(t), Mode: drawMode(t),
		UpdateConfig: maybe(t, "update", drawUpdate), RollbackConfig: maybe(t, "rollback", drawUpdate),
		EndpointSpec: maybe(t, "endpoint", func(t *rapid.T) swarm.EndpointSpec {
			return swarm.EndpointSpec{
				Mode: rapid.SampledFrom([]swarm.ResolutionMode{"vip", "dnsrr"}).Draw(t, "mode"),
				Ports: list(t, "ports", func(t *rapid.T) swarm.PortConfig {
					return swarm.PortConfig{
						Name: word(t, "name"), Protocol: "udp", TargetPort: 80, PublishedPort: rapid.Uint32Range(0, 65535).Draw(t, "port"),
						PublishMode: rapid.SampledFrom([]swarm.PortConfigPublishMode{"ingress", "host"}).Draw(t, "publish"),
					}
				}),
			}
		}),
	}
	if s.Labels == nil {
		s.Labels = map[string]string{}
	}
	return s
}

// TestServiceSpecRoundTrip says that a client reads the spec that it stored, and that
// storing what it read changes nothing: an update with an unchanged spec touches no task.
func TestServiceSpecRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		sent := drawSpec(t)
		stored, err := convert.StoreServiceSpec(sent, nil)
		if err != nil {
			t.Fatal(err)
		}
		got := convert.DockerServiceSpec(stored)
		if diff := cmp.Diff(sent, got, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
			t.Fatal(diff)
		}
		wire, err := json.Marshal(got)
		if err != nil {
			t.Fatal(err)
		}
		var read swarm.ServiceSpec
		if err := json.Unmarshal(wire, &read); err != nil {
			t.Fatal(err)
		}
		again, err := convert.StoreServiceSpec(read, nil)
		if err != nil {
			t.Fatal(err)
		}
		if !proto.Equal(stored, again) {
			t.Fatalf("stored again: %v\nbefore: %v", again, stored)
		}
	})
}

func TestLegacyNetworks(t *testing.T) {
	spec := swarm.ServiceSpec{TaskTemplate: swarm.TaskSpec{ContainerSpec: new(swarm.ContainerSpec)}}
	legacy := []swarm.NetworkAttachmentConfig{{Target: "old"}}
	stored, err := convert.StoreServiceSpec(spec, legacy)
	if err != nil || stored.GetTask().GetNetworks()[0].GetTarget() != "old" {
		t.Errorf("%v %v", stored, err)
	}
	spec.TaskTemplate.Networks = []swarm.NetworkAttachmentConfig{{Target: "new"}}
	stored, err = convert.StoreServiceSpec(spec, legacy)
	if err != nil || len(stored.GetTask().GetNetworks()) != 1 || stored.GetTask().GetNetworks()[0].GetTarget() != "new" {
		t.Errorf("%v %v", stored, err)
	}
}

func TestClusterSpecRoundTrip(t *testing.T) {
	sent := swarm.Spec{
		Annotations:      swarm.Annotations{Name: "default", Labels: map[string]string{"a": "b"}},
		Orchestration:    swarm.OrchestrationConfig{TaskHistoryRetentionLimit: new(int64(7))},
		Raft:             swarm.RaftConfig{SnapshotInterval: 1, KeepOldSnapshots: new(uint64(2)), LogEntriesForSlowFollowers: 3, ElectionTick: 4, HeartbeatTick: 5},
		Dispatcher:       swarm.DispatcherConfig{HeartbeatPeriod: time.Second},
		CAConfig:         swarm.CAConfig{NodeCertExpiry: time.Hour, ForceRotate: 6, ExternalCAs: []*swarm.ExternalCA{{Protocol: "cfssl", URL: "u", Options: map[string]string{"k": "v"}, CACert: "c"}}},
		TaskDefaults:     swarm.TaskDefaults{LogDriver: &swarm.Driver{Name: "json-file"}},
		EncryptionConfig: swarm.EncryptionConfig{AutoLockManagers: true},
	}
	stored, err := convert.StoreClusterSpec(sent)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(sent, convert.DockerSwarm(&api.Cluster{Spec: stored}).Spec); diff != "" {
		t.Error(diff)
	}
	merged, err := convert.InitClusterSpec(swarm.Spec{Raft: swarm.RaftConfig{SnapshotInterval: 7}})
	if err != nil || merged.GetRaft().GetSnapshotInterval() != 7 || merged.GetRaft().GetElectionTick() != 10 || merged.GetOrchestration().GetTaskHistoryRetentionLimit() != 5 {
		t.Errorf("what init leaves open gets its default: %v %v", merged, err)
	}
	if empty, err := convert.StoreClusterSpec(swarm.Spec{}); err != nil || empty.GetRaft() != nil || empty.GetCaConfig() != nil || empty.GetDispatcher() != nil {
		t.Errorf("what update leaves open is absent: %v %v", empty, err)
	}
}
