package ops_test

import (
	"crypto/rand"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/control/ops"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/core/store"
)

func TestTokens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		state := fill(t, withRoot(newRoot(t)))
		o := ops.NewTokens(state)
		for _, req := range []*skepv1.CreateTokenRequest{
			{Role: "queen", Ttl: durationpb.New(time.Hour)},
			{Role: "worker"},
			{Role: "worker", Ttl: durationpb.New(-time.Hour)},
			{Role: "worker", Ttl: durationpb.New(pki.MaxTokenLife + time.Second)},
		} {
			_, err := o.CreateToken(t.Context(), req)
			wantStatus(t, err, codes.InvalidArgument, "a join token …")
		}
		create := func(role string, ttl time.Duration, uses uint32) *skepv1.CreateTokenResponse {
			t.Helper()
			resp, err := o.CreateToken(t.Context(), &skepv1.CreateTokenRequest{
				Role: role, Ttl: durationpb.New(ttl), Uses: uses, Labels: map[string]string{"site": "lab"},
			})
			if err != nil {
				t.Fatal(err)
			}
			return resp
		}
		long, short := create("manager", 48*time.Hour, 3), create("worker", time.Hour, 1)
		if _, err := pki.ParseToken(long.GetToken()); err != nil || long.GetToken() == short.GetToken() {
			t.Errorf("tokens %s and %s: %v", long.GetToken(), short.GetToken(), err)
		}
		if kind := state.View().IDByName(model.Extensions, pki.TokenKind); kind == "" {
			t.Error("the kind of the resources was not made: Docker's managers want one")
		}
		list := func() []*skepv1.TokenInfo {
			t.Helper()
			resp, err := o.ListTokens(t.Context(), nil)
			if err != nil {
				t.Fatal(err)
			}
			return resp.GetTokens()
		}
		got := list()
		if len(got) != 2 || got[0].GetId() != short.GetInfo().GetId() || got[1].GetRole() != "manager" || got[1].GetUses() != 3 ||
			got[1].GetUsed() != 0 || got[1].GetLabels()["site"] != "lab" || got[0].GetVoid() != "" {
			t.Errorf("the list is %v", got)
		}
		time.Sleep(2 * time.Hour)
		if got := list(); got[0].GetVoid() == "" || got[1].GetVoid() != "" {
			t.Errorf("after two hours the list is %v", got)
		}
		_, err := o.RemoveToken(t.Context(), &skepv1.RemoveTokenRequest{Id: "nothing"})
		wantStatus(t, err, codes.NotFound, "join token nothing not found")
		if _, err := o.RemoveToken(t.Context(), &skepv1.RemoveTokenRequest{Id: long.GetInfo().GetId()[:10]}); err != nil {
			t.Error(err)
		}
		if got := list(); len(got) != 1 {
			t.Errorf("after a removal the list is %v", got)
		}
		// A resource of another kind is none of its business.
		if _, err := state.Update(t.Context(), func(tx *store.Tx) error {
			if err := tx.Create(&api.Extension{Id: "kind", Annotations: &api.Annotations{Name: "other"}}); err != nil {
				return err
			}
			return tx.Create(&api.Resource{Id: "other", Kind: "other", Annotations: &api.Annotations{Name: "other"}})
		}); err != nil {
			t.Fatal(err)
		}
		_, err = o.RemoveToken(t.Context(), &skepv1.RemoveTokenRequest{Id: "other"})
		wantStatus(t, err, codes.NotFound, "join token other not found")
		// What ended long ago is forgotten when another is made.
		time.Sleep(8 * 24 * time.Hour)
		fresh := create("worker", time.Hour, 0)
		if got := list(); len(got) != 1 || got[0].GetId() != fresh.GetInfo().GetId() {
			t.Errorf("a week later the list is %v", got)
		}
	})
}

// Tokens that ended long ago stood in the way of new ones until somebody removed them.
func TestOldTokensMakeRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		state := fill(t, withRoot(newRoot(t)))
		o := ops.NewTokens(state)
		create := func() error {
			_, err := o.CreateToken(t.Context(), &skepv1.CreateTokenRequest{Role: "worker", Ttl: durationpb.New(time.Hour)})
			return err
		}
		if err := create(); err != nil {
			t.Fatal(err)
		}
		if _, err := state.Update(t.Context(), func(tx *store.Tx) error {
			for range 9999 {
				_, r, err := pki.NewLimited(rand.Reader, tx.Snapshot().Cluster().GetRootCa(), false, pki.WorkerRole, tx.Now().Add(time.Hour), 1, nil)
				if err != nil {
					return err
				}
				if r.Id, err = model.NewID(rand.Reader); err != nil {
					return err
				}
				if err := tx.Create(r); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		wantStatus(t, create(), codes.ResourceExhausted, "there are 10000 join tokens…")
		time.Sleep(8 * 24 * time.Hour)
		if err := create(); err != nil {
			t.Error(err)
		}
		resp, err := o.ListTokens(t.Context(), nil)
		if err != nil || len(resp.GetTokens()) != 1 {
			t.Errorf("%d tokens are left: %v", len(resp.GetTokens()), err)
		}
	})
}
