package ops_test

import (
	"crypto/rand"
	"testing"

	"google.golang.org/grpc/codes"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/control/ops"
	"github.com/skep-dev/skep/control/replica"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/store"
)

func aSecret(id, name, data string, labels map[string]string) *api.Secret {
	return &api.Secret{Id: id, Spec: &api.SecretSpec{Annotations: &api.Annotations{Name: name, Labels: labels}, Data: []byte(data)}}
}

// refersTo returns a service that uses a secret.
func refersTo(id, name, secret, secretName string, edits ...func(*api.ServiceSpec)) *api.Service {
	return service(id, name, append(edits, in(func(c *api.ContainerSpec) {
		c.Secrets = []*api.SecretReference{{SecretId: secret, SecretName: secretName, Target: &api.SecretReference_File{File: &api.FileTarget{Name: "f", Uid: "7"}}}}
	}))...)
}

// wantSecrets compares names and data of all secrets, and whose data each service uses.
func wantSecrets(t *testing.T, state *replica.Memory, secrets, services map[string]string) {
	t.Helper()
	view := state.View()
	n := 0
	for s := range view.Secrets() {
		n++
		if name := s.GetSpec().GetAnnotations().GetName(); secrets[name] != string(s.GetSpec().GetData()) {
			t.Errorf("secret %s is %q, want %q", name, s.GetSpec().GetData(), secrets[name])
		}
	}
	if n != len(secrets) {
		t.Errorf("there are %d secrets, want %d", n, len(secrets))
	}
	for id, want := range services {
		ref := view.Service(id).GetSpec().GetTask().GetContainer().GetSecrets()[0]
		secret := view.Secret(ref.GetSecretId())
		if string(secret.GetSpec().GetData()) != want || ref.GetSecretName() != secret.GetSpec().GetAnnotations().GetName() || ref.GetFile().GetUid() != "7" {
			t.Errorf("service %s refers to %v, whose data is %q, want %q", id, ref, secret.GetSpec().GetData(), want)
		}
	}
}

func TestRotateAndRollBack(t *testing.T) {
	job := func(s *api.ServiceSpec) {
		s.Mode = &api.ServiceSpec_ReplicatedJob{ReplicatedJob: new(api.ReplicatedJob)}
	}
	state := fill(t, aSecret("s", "db", "one", map[string]string{"team": "a"}), aSecret("o", "other", "x", nil),
		refersTo("a", "a", "s", "db"), refersTo("j", "j", "s", "db", job), refersTo("b", "b", "o", "other"))
	r := ops.NewSecrets(state, rand.Reader)
	ctx := t.Context()
	current := func() string { return state.View().IDByName(model.Secrets, "db") }
	rotate := func(data string) *skepv1.RotateSecretResponse {
		t.Helper()
		resp, err := r.Rotate(ctx, &skepv1.RotateSecretRequest{SecretId: current(), Data: []byte(data)})
		if err != nil {
			t.Fatal(err)
		}
		return resp
	}
	resp := rotate("two")
	if resp.GetVersion() != 2 || resp.GetFormerName() != "db.1" || len(resp.GetServices()) != 2 || resp.GetSecretId() != current() {
		t.Errorf("rotated: %v", resp)
	}
	for _, s := range resp.GetServices() {
		if s.GetJob() != (s.GetName() == "j") {
			t.Errorf("%v", s)
		}
	}
	if got := state.View().Service("a"); got.GetPreviousSpec().GetTask().GetContainer().GetSecrets()[0].GetSecretId() != "s" || got.GetSpecVersion().GetIndex() == 0 {
		t.Errorf("the service does not roll: %v", got)
	}
	wantSecrets(t, state, map[string]string{"db": "two", "db.1": "one", "other": "x"}, map[string]string{"a": "two", "j": "two", "b": "x"})
	if l := state.View().Secret(current()).GetSpec().GetAnnotations().GetLabels(); l["team"] != "a" || l["skep.secret.version"] != "2" {
		t.Errorf("labels %v", l)
	}
	back := func() {
		t.Helper()
		if _, err := r.Rollback(ctx, &skepv1.RollbackSecretRequest{SecretId: current()}); err != nil {
			t.Fatal(err)
		}
	}
	back()
	wantSecrets(t, state, map[string]string{"db": "one", "db.2": "two", "other": "x"}, map[string]string{"a": "one", "j": "one"})
	if current() != "s" {
		t.Errorf("the secret is %s, which is not what it was", current())
	}
	back() // a rollback is undone like a rotation
	wantSecrets(t, state, map[string]string{"db": "two", "db.1": "one", "other": "x"}, map[string]string{"a": "two", "j": "two"})
	// A former value goes with the next rotation, unless a task still may need it.
	if resp := rotate("three"); resp.GetVersion() != 3 || len(resp.GetRemoved()) != 1 || resp.GetRemoved()[0] != "db.1" {
		t.Errorf("rotated: %v", resp)
	}
	two := state.View().IDByName(model.Secrets, "db.2")
	_, err := state.Update(ctx, func(tx *store.Tx) error {
		return tx.Create(&api.Task{
			Id: "old", DesiredState: api.TaskState_RUNNING, Status: &api.TaskStatus{State: api.TaskState_RUNNING},
			Spec: refersTo("", "", two, "db").GetSpec().GetTask(),
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	rotate("four")
	wantSecrets(t, state, map[string]string{"db": "four", "db.2": "two", "db.3": "three", "other": "x"}, map[string]string{"a": "four"})
	// Who edits the labels does not break what follows.
	o := ops.New(ops.Config{State: state, Random: new(zeros)})
	id := current()
	if _, err := o.UpdateSecret(ctx, &api.UpdateSecretRequest{
		SecretId: id, SecretVersion: version(t, state, model.Secrets, id), Spec: &api.SecretSpec{Annotations: &api.Annotations{Name: "db"}},
	}); err != nil {
		t.Fatal(err)
	}
	if resp := rotate("five"); resp.GetVersion() != 5 || resp.GetFormerName() != "db.4" {
		t.Errorf("rotated: %v", resp)
	}
}

func TestRotateRefusals(t *testing.T) {
	driven := aSecret("d", "driven", "", nil)
	driven.Spec.Driver = &api.Driver{Name: "vault"}
	form := aSecret("t", "form", "x", nil)
	form.Spec.Templating = &api.Driver{Name: "golang"}
	state := fill(t, aSecret("s", "db", "one", nil), aSecret("f", "db.9", "nine", map[string]string{"skep.secret.former": "gone"}), driven, form,
		aSecret("c", "clash", "x", nil), aSecret("c1", "clash.1", "x", nil), aSecret("l", "long-name-of-a-secret-that-fills-all-the-sixty-four-characters-yy", "x", nil))
	r := ops.NewSecrets(state, rand.Reader)
	for _, c := range []struct {
		id, data string
		code     codes.Code
		text     string
	}{
		{"", "x", codes.InvalidArgument, "no object id given"},
		{"absent", "x", codes.NotFound, "secret absent not found"},
		{"s", "", codes.InvalidArgument, "secret data must be larger than 0 and less than 512000 bytes"},
		{"s", string(make([]byte, 512000)), codes.InvalidArgument, "secret data must be larger than 0 and less than 512000 bytes"},
		{"d", "x", codes.FailedPrecondition, "secret driven gets its value from the driver vault…"},
		{"f", "x", codes.FailedPrecondition, "secret db.9 is a former value of gone: name that one"},
		{"t", "{{", codes.InvalidArgument, "template, line 1: unclosed action"},
		{"c", "x", codes.AlreadyExists, "the former value of secret clash would be called clash.1, but…"},
		{"l", "x", codes.InvalidArgument, "the former value of secret long-name…"},
	} {
		_, err := r.Rotate(t.Context(), &skepv1.RotateSecretRequest{SecretId: c.id, Data: []byte(c.data)})
		wantStatus(t, err, c.code, c.text)
	}
	_, err := r.Rollback(t.Context(), &skepv1.RollbackSecretRequest{SecretId: "s"})
	wantStatus(t, err, codes.FailedPrecondition, "secret db has no former value: it was never rotated")
}
