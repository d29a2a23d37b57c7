package ops

import (
	"context"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/platform/cfssl"
)

// rootChange is what an update of the cluster makes of the root with a certain content.
type rootChange struct {
	from, to *api.RootCA
}

// planRoot works out what an update makes of the root, and has the new root of a rotation
// signed by the present one, which may mean to ask others: so it is done before the
// transaction. The zero rootChange changes nothing.
func (o *Ops) planRoot(ctx context.Context, req *api.UpdateClusterRequest) (rootChange, error) {
	cluster := o.state.View().Cluster()
	want := req.GetSpec().GetCaConfig()
	if cluster == nil || cluster.GetId() != req.GetClusterId() {
		return rootChange{}, notFound("cluster", req.GetClusterId())
	}
	if err := cfssl.Check(want.GetExternalCas()); err != nil {
		return rootChange{}, err
	}
	if o.external == nil && len(want.GetExternalCas()) > 0 {
		return rootChange{}, invalid("this manager reaches no external CA")
	}
	now := time.Now()
	plan, err := pki.PlanRoot(o.random, now, cluster.GetRootCa(), want)
	if err != nil || plan.Next == nil {
		return rootChange{}, err
	}
	present := cluster.GetRootCa().GetCaCert()
	for _, root := range plan.External {
		trusted, err := pki.ParseCerts(slices.Concat(present, root))
		if err != nil {
			return rootChange{}, err
		}
		if err := o.external.Reachable(ctx, cfssl.For(want.GetExternalCas(), present, root), trusted); err != nil {
			return rootChange{}, err
		}
	}
	if plan.To != nil {
		if plan.Next.RootRotation.CrossSignedCaCert, err = o.crossSign(ctx, cluster.GetRootCa(), plan.To, want.GetExternalCas(), now); err != nil {
			return rootChange{}, err
		}
	}
	return rootChange{from: cluster.GetRootCa(), to: plan.Next}, nil
}

// crossSign has a new root certified by the present one and checks the outcome.
func (o *Ops) crossSign(ctx context.Context, ca *api.RootCA, to *pki.Root, external []*api.ExternalCA, now time.Time) ([]byte, error) {
	present, err := pki.ParseRoot(ca.GetCaCert(), ca.GetCaKey())
	if err != nil {
		return nil, err
	}
	var cross []byte
	if present.Key != nil {
		cross, err = present.CrossSign(o.random, to.Certs[0])
	} else {
		cross, err = o.external.CrossSign(ctx, cfssl.For(external, ca.GetCaCert(), ca.GetCaCert()), present.Certs, to)
	}
	if err != nil {
		return nil, err
	}
	return cross, pki.CheckCross(present, to, cross, now)
}

// adoptRoot puts a planned root into a cluster, unless its root changed meanwhile. What
// was given to sign with is kept in the root alone, never in the spec.
func adoptRoot(updated, old *api.Cluster, change rootChange) error {
	if ca := updated.Spec.GetCaConfig(); ca != nil {
		ca.SigningCaCert, ca.SigningCaKey = nil, nil
	}
	if change.to == nil {
		return nil
	}
	if !proto.Equal(old.GetRootCa(), change.from) {
		return model.ErrSequence
	}
	updated.RootCa = model.Clone(change.to)
	return nil
}
