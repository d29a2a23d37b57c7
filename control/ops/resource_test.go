package ops_test

import (
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
)

// TestOwnResources: nobody makes, changes or removes what Skep keeps its own state in, and
// what somebody else has called so can be removed.
func TestOwnResources(t *testing.T) {
	named := func(name string) *api.Annotations { return &api.Annotations{Name: name} }
	o, state := newOps(t, nil,
		&api.Extension{Id: "own", Annotations: named(pki.RotationKind)}, &api.Extension{Id: "other", Annotations: named("other")},
		&api.Resource{Id: "tokens", Annotations: named("a"), Kind: pki.RotationKind},
		&api.Resource{Id: "foreign", Annotations: named(pki.PeersKind), Kind: "other"},
	)
	ctx := t.Context()
	version := func(id string) *api.Version {
		return state.View().Get(model.Resources, id).(*api.Resource).GetMeta().GetVersion()
	}
	refused := map[string]func() error{
		"create an extension": func() error {
			_, err := o.CreateExtension(ctx, &api.CreateExtensionRequest{Annotations: named("Skep.new")})
			return err
		},
		"remove an extension": func() error {
			_, err := o.RemoveExtension(ctx, &api.RemoveExtensionRequest{ExtensionId: "own"})
			return err
		},
		"create a resource of a name": func() error {
			_, err := o.CreateResource(ctx, &api.CreateResourceRequest{Annotations: named(pki.RotationKind), Kind: "other"})
			return err
		},
		"create a resource of a kind": func() error {
			_, err := o.CreateResource(ctx, &api.CreateResourceRequest{Annotations: named("b"), Kind: pki.RotationKind})
			return err
		},
		"update a resource": func() error {
			_, err := o.UpdateResource(ctx, &api.UpdateResourceRequest{ResourceId: "tokens", ResourceVersion: version("tokens"), Annotations: named("a")})
			return err
		},
		"remove a resource": func() error {
			_, err := o.RemoveResource(ctx, &api.RemoveResourceRequest{ResourceId: "tokens"})
			return err
		},
	}
	for what, try := range refused {
		if err := try(); status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "Skep's own") {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := o.CreateResource(ctx, &api.CreateResourceRequest{Annotations: named("skepticism"), Kind: "other"}); err != nil {
		t.Error(err)
	}
	if _, err := o.RemoveResource(ctx, &api.RemoveResourceRequest{ResourceId: "foreign"}); err != nil {
		t.Error(err)
	}
}

// TestFormerLabel: a secret does not become a former value of another one, which would be
// removed at that one's next rotation, by a label that somebody gives it.
func TestFormerLabel(t *testing.T) {
	const former = "skep.secret.former"
	o, state := newOps(t, nil)
	ctx := t.Context()
	labelled := func(labels map[string]string) *api.SecretSpec {
		return &api.SecretSpec{Annotations: &api.Annotations{Name: "s", Labels: labels}, Data: []byte("x")}
	}
	of := map[string]string{former: "web"}
	if _, err := o.CreateSecret(ctx, &api.CreateSecretRequest{Spec: labelled(of)}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("create: %v", err)
	}
	made, err := o.CreateSecret(ctx, &api.CreateSecretRequest{Spec: labelled(nil)})
	if err != nil {
		t.Fatal(err)
	}
	update := func(labels map[string]string) error {
		id := made.GetSecret().GetId()
		_, err := o.UpdateSecret(ctx, &api.UpdateSecretRequest{
			SecretId: id, SecretVersion: state.View().Secret(id).GetMeta().GetVersion(), Spec: labelled(labels),
		})
		return err
	}
	if err := update(of); status.Code(err) != codes.InvalidArgument {
		t.Errorf("update: %v", err)
	}
	if err := update(map[string]string{"a": "b"}); err != nil {
		t.Error(err)
	}
}
