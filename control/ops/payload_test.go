package ops_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/control/ops"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
)

const badName = "invalid name, only 64 [a-zA-Z0-9-_.] characters allowed, and the start and end character must be [a-zA-Z0-9]"

func TestSecretAndConfigRefusals(t *testing.T) {
	tests := []struct {
		name         string
		object       string
		size         int
		secret, conf string // expected texts, "" for success
		code         codes.Code
	}{
		{"good", "a.b-c_d", 1, "", "", codes.OK},
		{"no name", "", 1, "name must be provided", "name must be provided", codes.InvalidArgument},
		{"bad start", ".a", 1, badName, badName, codes.InvalidArgument},
		{"bad end", "a.", 1, badName, badName, codes.InvalidArgument},
		{"long", strings.Repeat("a", 65), 1, badName, badName, codes.InvalidArgument},
		{"longest", strings.Repeat("a", 64), 1, "", "", codes.OK},
		{"empty", "x", 0, "secret data must be larger than 0 and less than 512000 bytes", "config data must be larger than 0 and less than 1024000 bytes", codes.InvalidArgument},
		{"largest secret", "x", 511999, "", "", codes.OK},
		{"too large for a secret", "x", 512000, "secret data must be larger than 0 and less than 512000 bytes", "", codes.InvalidArgument},
		{"largest config", "x", 1023999, "secret data must be larger than 0 and less than 512000 bytes", "", codes.InvalidArgument},
		{"too large", "x", 1024000, "secret data must be larger than 0 and less than 512000 bytes", "config data must be larger than 0 and less than 1024000 bytes", codes.InvalidArgument},
		{"taken", "TAKEN", 1, "secret TAKEN already exists", "config TAKEN already exists", codes.AlreadyExists},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			a := &api.Annotations{Name: "taken"}
			o, _ := newOps(t, nil, &api.Secret{Id: "s", Spec: &api.SecretSpec{Annotations: a}}, &api.Config{Id: "c", Spec: &api.ConfigSpec{Annotations: a}})
			data := make([]byte, tt.size)
			want := func(text string) (codes.Code, string) {
				if text == "" {
					return codes.OK, ""
				}
				return tt.code, text
			}
			secret, err := o.CreateSecret(t.Context(), &api.CreateSecretRequest{Spec: &api.SecretSpec{Annotations: &api.Annotations{Name: tt.object}, Data: data}})
			code, text := want(tt.secret)
			wantStatus(t, err, code, text)
			if secret.GetSecret().GetSpec().GetData() != nil {
				t.Error("a secret's data was returned")
			}
			_, err = o.CreateConfig(t.Context(), &api.CreateConfigRequest{Spec: &api.ConfigSpec{Annotations: &api.Annotations{Name: tt.object}, Data: data}})
			code, text = want(tt.conf)
			wantStatus(t, err, code, text)
		})
	}
	o, _ := newOps(t, nil)
	_, err := o.CreateSecret(t.Context(), &api.CreateSecretRequest{Spec: &api.SecretSpec{Annotations: &api.Annotations{Name: "x"}, Driver: new(api.Driver)}})
	wantStatus(t, err, codes.InvalidArgument, "secret driver must have a name")
	_, err = o.CreateSecret(t.Context(), &api.CreateSecretRequest{Spec: &api.SecretSpec{Annotations: &api.Annotations{Name: "x"}, Driver: &api.Driver{Name: "x"}}})
	wantStatus(t, err, codes.Unknown, `plugin "x" not found`)
	driven := ops.New(ops.Config{State: fill(t), Random: new(zeros), SecretDriver: func(_ context.Context, name string) error {
		if name != "vault" {
			return model.Errorf(model.NotFound, "no %s here", name)
		}
		return nil
	}})
	for name, c := range map[string]struct {
		spec *api.SecretSpec
		code codes.Code
		text string
	}{
		"good":      {&api.SecretSpec{Driver: &api.Driver{Name: "vault"}}, codes.OK, ""},
		"absent":    {&api.SecretSpec{Driver: &api.Driver{Name: "other"}}, codes.NotFound, "no other here"},
		"with-data": {&api.SecretSpec{Driver: &api.Driver{Name: "vault"}, Data: []byte("x")}, codes.InvalidArgument, "secret with-data has a driver, so it cannot have data: the driver vault gives its value"},
		"template":  {&api.SecretSpec{Data: []byte("{{"), Templating: &api.Driver{Name: "golang"}}, codes.InvalidArgument, "template, line 1: unclosed action"},
		"jinja":     {&api.SecretSpec{Data: []byte("x"), Templating: &api.Driver{Name: "jinja"}}, codes.InvalidArgument, `template driver "jinja" is not known: use golang`},
	} {
		c.spec.Annotations = &api.Annotations{Name: name}
		_, err := driven.CreateSecret(t.Context(), &api.CreateSecretRequest{Spec: c.spec})
		wantStatus(t, err, c.code, c.text)
	}
}

func TestSecretLife(t *testing.T) {
	ctx := t.Context()
	user := func(name string) *api.Service {
		return service("id"+name, name, in(func(c *api.ContainerSpec) {
			c.Secrets = []*api.SecretReference{{SecretId: "s", SecretName: "s1", Target: &api.SecretReference_File{File: &api.FileTarget{Name: "f"}}}}
		}))
	}
	o, state := newOps(t, nil, user("b"), user("a"),
		&api.Secret{Id: "s", Spec: &api.SecretSpec{Annotations: &api.Annotations{Name: "s1"}, Data: []byte("hidden")}},
		&api.Secret{Id: "i", Internal: true, Spec: &api.SecretSpec{Annotations: &api.Annotations{Name: "inner"}, Data: []byte("hidden")}})
	list, err := o.ListSecrets(ctx, new(api.ListSecretsRequest))
	if err != nil || len(list.GetSecrets()) != 1 || list.GetSecrets()[0].GetSpec().GetData() != nil {
		t.Errorf("list: %v %v", list, err)
	}
	for _, f := range []*api.ListSecretsRequest_Filters{{Names: []string{"S1"}}, {NamePrefixes: []string{"S"}}, {IdPrefixes: []string{"s"}, Names: []string{"other"}}} {
		if list, err := o.ListSecrets(ctx, &api.ListSecretsRequest{Filters: f}); err != nil || len(list.GetSecrets()) != 1 {
			t.Errorf("filter %v: %v %v", f, list, err)
		}
	}
	_, err = o.RemoveSecret(ctx, &api.RemoveSecretRequest{SecretId: "s"})
	wantStatus(t, err, codes.InvalidArgument, "secret 's1' is in use by the following services: a, b")

	update := func(spec *api.SecretSpec, v *api.Version) error {
		_, err := o.UpdateSecret(ctx, &api.UpdateSecretRequest{SecretId: "s", SecretVersion: v, Spec: spec})
		return err
	}
	now := version(t, state, model.Secrets, "s")
	wantStatus(t, update(&api.SecretSpec{Annotations: &api.Annotations{Name: "s1"}, Data: []byte("other")}, now), codes.InvalidArgument, "only updates to Labels are allowed")
	wantStatus(t, update(&api.SecretSpec{Annotations: &api.Annotations{Name: "s2"}}, now), codes.InvalidArgument, "only updates to Labels are allowed")
	wantStatus(t, update(&api.SecretSpec{Annotations: &api.Annotations{Name: "s1"}}, &api.Version{Index: 1}), codes.Unknown, "update out of sequence")
	wantStatus(t, update(&api.SecretSpec{Annotations: &api.Annotations{Name: "s1", Labels: map[string]string{"a": "b"}}}, now), codes.OK, "")
	wantStatus(t, update(&api.SecretSpec{Annotations: &api.Annotations{Name: "s1"}, Data: []byte("hidden")}, version(t, state, model.Secrets, "s")), codes.OK, "")
	if got := state.View().Secret("s").GetSpec(); string(got.GetData()) != "hidden" || len(got.GetAnnotations().GetLabels()) != 0 {
		t.Errorf("after updates: %v", got)
	}
	for _, id := range []string{"ida", "idb"} {
		if _, err := o.RemoveService(ctx, &api.RemoveServiceRequest{ServiceId: id}); err != nil {
			t.Fatal(err)
		}
	}
	_, err = o.RemoveSecret(ctx, &api.RemoveSecretRequest{SecretId: "s"})
	wantStatus(t, err, codes.OK, "")
	_, err = o.GetSecret(ctx, &api.GetSecretRequest{SecretId: "s"})
	wantStatus(t, err, codes.NotFound, "secret s not found")
}

func TestClusterReadsHideKeys(t *testing.T) {
	o, state := newOps(t, nil, aCluster())
	resp, err := o.GetCluster(t.Context(), &api.GetClusterRequest{ClusterId: "cluster"})
	if err != nil {
		t.Fatal(err)
	}
	c := resp.GetCluster()
	if c.GetRootCa().GetCaKey() != nil || c.GetUnlockKeys() != nil || c.GetNetworkBootstrapKeys() != nil || c.GetSpec().GetCaConfig().GetSigningCaKey() != nil {
		t.Errorf("keys are shown: %v", c)
	}
	if c.GetSubnetSize() != 24 || c.GetVXLANUDPPort() != 4789 || c.GetDefaultAddressPool()[0] != "10.0.0.0/8" || c.GetRootCa().GetJoinTokens().GetWorker() != "w" {
		t.Errorf("defaults are missing: %v", c)
	}
	if string(state.View().Cluster().GetRootCa().GetCaKey()) != "key" {
		t.Error("the stored cluster was changed")
	}
}

func TestUpdateCluster(t *testing.T) {
	tests := []struct {
		name     string
		edit     func(*api.ClusterSpec)
		rotation *api.KeyRotation
		code     codes.Code
		text     string
	}{
		{"nothing", func(*api.ClusterSpec) {}, nil, codes.OK, ""},
		{"expiry", func(s *api.ClusterSpec) { s.CaConfig.NodeCertExpiry = durationpb.New(time.Minute) }, nil, codes.InvalidArgument, "minimum certificate expiry time is: 1h0m0s"},
		{"heartbeat", func(s *api.ClusterSpec) { s.Dispatcher = &api.DispatcherConfig{HeartbeatPeriod: durationpb.New(-1)} }, nil, codes.InvalidArgument, "heartbeat time period cannot be a negative duration"},
		{"given key alone", func(s *api.ClusterSpec) { s.CaConfig.SigningCaKey = []byte("x") }, nil, codes.InvalidArgument, "if a signing CA key is provided, the signing CA cert must also be provided"},
		{"given root", func(s *api.ClusterSpec) { s.CaConfig.SigningCaCert = []byte("x") }, nil, codes.InvalidArgument, "invalid signing CA: no certificate"},
		{"external CA", func(s *api.ClusterSpec) { s.CaConfig.ExternalCas = []*api.ExternalCA{{Url: "https://ca"}} }, nil, codes.InvalidArgument, "this manager reaches no external CA"},
		{"rotate worker token", func(*api.ClusterSpec) {}, &api.KeyRotation{WorkerJoinToken: true}, codes.OK, ""},
		{"rotate manager token", func(*api.ClusterSpec) {}, &api.KeyRotation{ManagerJoinToken: true}, codes.OK, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			o, state := newOps(t, nil, aCluster())
			read, err := o.GetCluster(t.Context(), &api.GetClusterRequest{ClusterId: "cluster"})
			if err != nil {
				t.Fatal(err)
			}
			s := read.GetCluster().GetSpec()
			tt.edit(s)
			_, err = o.UpdateCluster(t.Context(), &api.UpdateClusterRequest{
				ClusterId: "cluster", ClusterVersion: version(t, state, model.Clusters, "cluster"), Spec: s, Rotation: tt.rotation,
			})
			wantStatus(t, err, tt.code, tt.text)
			c := state.View().Cluster()
			if tt.code == codes.OK && c.GetSpec().GetCaConfig().GetSigningCaKey() != nil {
				t.Error("the spec keeps a signing key")
			}
			tokens := c.GetRootCa().GetJoinTokens()
			if (tokens.GetWorker() != "w") != tt.rotation.GetWorkerJoinToken() || (tokens.GetManager() != "m") != tt.rotation.GetManagerJoinToken() {
				t.Errorf("tokens: %v", tokens)
			}
		})
	}
}

func TestUpdateClusterLocks(t *testing.T) {
	o, state := newOps(t, nil, aCluster()) // which holds the key of another subsystem
	keys := map[string]bool{}
	for _, tt := range []struct {
		name           string
		lock, rotate   bool
		keys           int
		another, fresh bool
	}{
		{"off, rotated", false, true, 1, false, false},
		{"on", true, false, 2, true, true},
		{"still on", true, false, 2, true, false},
		{"rotated", true, true, 2, true, true},
		{"off", false, false, 1, false, false},
		{"on again", true, false, 2, true, true},
	} {
		read, err := o.GetCluster(t.Context(), &api.GetClusterRequest{ClusterId: "cluster"})
		if err != nil {
			t.Fatal(err)
		}
		s := read.GetCluster().GetSpec()
		s.EncryptionConfig = &api.EncryptionConfig{AutoLockManagers: tt.lock}
		resp, err := o.UpdateCluster(t.Context(), &api.UpdateClusterRequest{
			ClusterId: "cluster", ClusterVersion: version(t, state, model.Clusters, "cluster"), Spec: s,
			Rotation: &api.KeyRotation{ManagerUnlockKey: tt.rotate},
		})
		if err != nil || resp.GetCluster().GetUnlockKeys() != nil {
			t.Fatalf("%s: %v, %v", tt.name, resp, err)
		}
		c := state.View().Cluster()
		kek := pki.ManagersKEK(c)
		fresh := kek != nil && !keys[string(kek)]
		keys[string(kek)] = true
		if len(c.GetUnlockKeys()) != tt.keys || (len(kek) == pki.KEKLength) != tt.another || fresh != tt.fresh {
			t.Errorf("%s: %d keys, the managers' is %x, fresh %t", tt.name, len(c.GetUnlockKeys()), kek, fresh)
		}
	}
}

func TestNetworkRefusals(t *testing.T) {
	dying := aTask("t1", "gone", 1, api.TaskState_RUNNING, api.TaskState_RUNNING)
	dying.Networks = []*api.NetworkAttachment{{Network: &api.Network{Id: "net"}}}
	o, _ := newOps(t, nil, append(networks(), service("s", "web", publish(port(ingress, 1, 1))), dying)...)
	create := func(o *ops.Ops, n *api.NetworkSpec) error {
		_, err := o.CreateNetwork(t.Context(), &api.CreateNetworkRequest{Spec: n})
		return err
	}
	remove := func(id string) error {
		_, err := o.RemoveNetwork(t.Context(), &api.RemoveNetworkRequest{NetworkId: id})
		return err
	}
	named := &api.Annotations{Name: "x"}
	wantStatus(t, create(o, &api.NetworkSpec{Annotations: named, Ingress: true, Attachable: true}), codes.InvalidArgument, "ingress network cannot be attachable")
	wantStatus(t, create(o, &api.NetworkSpec{Annotations: named, Ingress: true}), codes.AlreadyExists, "ingress network (ing) is already present")
	wantStatus(t, create(o, &api.NetworkSpec{Annotations: &api.Annotations{Name: "FRONT"}}), codes.Unknown, "name conflicts with an existing object")
	wantStatus(t, create(o, &api.NetworkSpec{Annotations: named}), codes.OK, "")
	wantStatus(t, remove("hst"), codes.FailedPrecondition, "network host (hst) is a swarm predefined network and cannot be removed")
	wantStatus(t, remove("ing"), codes.FailedPrecondition, "ingress network cannot be removed because service s depends on it")
	wantStatus(t, remove("nope"), codes.NotFound, "network nope not found")
	wantStatus(t, remove("net"), codes.OK, "") // the task of a removed service does not hold it
}

func TestResources(t *testing.T) {
	ctx := t.Context()
	o, state := newOps(t, nil)
	create := func(name, kind string) error {
		_, err := o.CreateResource(ctx, &api.CreateResourceRequest{Annotations: &api.Annotations{Name: name}, Kind: kind})
		return err
	}
	wantStatus(t, create("r", "k"), codes.InvalidArgument, `resource kind "k" is not the name of an extension`)
	e, err := o.CreateExtension(ctx, &api.CreateExtensionRequest{Annotations: &api.Annotations{Name: "k"}})
	if err != nil {
		t.Fatal(err)
	}
	wantStatus(t, create("", "k"), codes.InvalidArgument, "resource must have a name")
	wantStatus(t, create("r", ""), codes.InvalidArgument, "resource must belong to an extension")
	wantStatus(t, create("r", "k"), codes.OK, "")
	wantStatus(t, create("R", "k"), codes.AlreadyExists, "resource R already exists")
	_, err = o.RemoveExtension(ctx, &api.RemoveExtensionRequest{ExtensionId: e.GetExtension().GetId()})
	wantStatus(t, err, codes.InvalidArgument, "extension 'k' is in use by resource 'r'")
	list, err := o.ListResources(ctx, &api.ListResourcesRequest{Filters: &api.ListResourcesRequest_Filters{Kind: "k"}})
	if err != nil || len(list.GetResources()) != 1 {
		t.Fatalf("%v %v", list, err)
	}
	id := list.GetResources()[0].GetId()
	_, err = o.UpdateResource(ctx, &api.UpdateResourceRequest{ResourceId: id, ResourceVersion: version(t, state, model.Resources, id), Annotations: &api.Annotations{Name: "other"}})
	wantStatus(t, err, codes.InvalidArgument, "resource r cannot be renamed")
	_, err = o.UpdateResource(ctx, &api.UpdateResourceRequest{ResourceId: id, ResourceVersion: version(t, state, model.Resources, id), Annotations: &api.Annotations{Name: "r", Labels: map[string]string{"a": "b"}}})
	wantStatus(t, err, codes.OK, "")
	_, err = o.RemoveResource(ctx, &api.RemoveResourceRequest{ResourceId: id})
	wantStatus(t, err, codes.OK, "")
	_, err = o.RemoveExtension(ctx, &api.RemoveExtensionRequest{ExtensionId: e.GetExtension().GetId()})
	wantStatus(t, err, codes.OK, "")
	_, err = o.CreateVolume(ctx, new(api.CreateVolumeRequest))
	wantStatus(t, err, codes.Unimplemented, "cluster volumes are not implemented by skep")
}
