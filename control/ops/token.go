package ops

import (
	"cmp"
	"context"
	"crypto/rand"
	"slices"
	"strings"
	"time"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/control/replica"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/core/store"
)

const (
	// maxTokens bounds the limited tokens of a swarm.
	maxTokens = 10000
	// voidMemory is how long a token that expired is still listed.
	voidMemory = 7 * 24 * time.Hour
)

// Tokens keeps join tokens that end by themselves. It implements skepv1.TokensServer.
type Tokens struct {
	skepv1.UnimplementedTokensServer

	state replica.State
}

// NewTokens returns a Tokens on a state.
func NewTokens(state replica.State) *Tokens { return &Tokens{state: state} }

// CreateToken makes a join token.
func (o *Tokens) CreateToken(ctx context.Context, req *skepv1.CreateTokenRequest) (*skepv1.CreateTokenResponse, error) {
	role, ok := map[string]string{"worker": pki.WorkerRole, "manager": pki.ManagerRole}[req.GetRole()]
	ttl := req.GetTtl().AsDuration()
	switch {
	case !ok:
		return nil, fail(invalid("a join token is for the role worker or manager, not %q", req.GetRole()))
	case ttl <= 0 || ttl > pki.MaxTokenLife:
		return nil, fail(invalid("a join token lives for more than no time and at most %d h, not %s", int(pki.MaxTokenLife.Hours()), ttl))
	}
	id, err := model.NewID(rand.Reader)
	if err != nil {
		return nil, fail(err)
	}
	resp := new(skepv1.CreateTokenResponse)
	_, err = o.state.Update(ctx, func(tx *store.Tx) error {
		if err := o.room(tx); err != nil {
			return err
		}
		c := tx.Snapshot().Cluster()
		token, r, err := pki.NewLimited(rand.Reader, c.GetRootCa(), c.GetFips(), role, tx.Now().Add(ttl), req.GetUses(), req.GetLabels())
		if err != nil {
			return err
		}
		r.Id, resp.Token = id, token
		return tx.Create(r)
	})
	if err != nil {
		return nil, fail(err)
	}
	s := o.state.View()
	if r, ok := s.Get(model.Resources, id).(*api.Resource); ok {
		resp.Info = tokenInfo(s, r, time.Now())
	}
	return resp, nil
}

// room makes the kind of resource that tokens are, and forgets tokens that ended long ago.
func (o *Tokens) room(tx *store.Tx) error {
	if tx.Snapshot().Cluster() == nil {
		return model.ErrNoLeader
	}
	if err := tx.DefineKind(rand.Reader, pki.TokenKind, "join tokens that end by themselves, made by skep token create"); err != nil {
		return err
	}
	for _, r := range tokens(tx.Snapshot()) {
		if t, err := pki.Limited(r); err == nil && tx.Now().Sub(t.GetExpires().AsTime()) > voidMemory {
			if err := tx.Remove(model.Resources, r.GetId()); err != nil {
				return err
			}
		}
	}
	if n := len(tokens(tx.Snapshot())); n >= maxTokens {
		return model.Errorf(model.Exhausted, "there are %d join tokens: remove some with `skep token rm`", n)
	}
	return nil
}

func tokens(s *store.Snapshot) (all []*api.Resource) {
	for r := range resources(s) {
		if r.GetKind() == pki.TokenKind {
			all = append(all, r)
		}
	}
	return all
}

func tokenInfo(s *store.Snapshot, r *api.Resource, now time.Time) *skepv1.TokenInfo {
	info := &skepv1.TokenInfo{Id: r.GetId(), Created: r.GetMeta().GetCreatedAt(), Labels: r.GetAnnotations().GetLabels()}
	t, err := pki.Limited(r)
	if err != nil {
		info.Void = err.Error()
		return info
	}
	info.Role = strings.TrimPrefix(t.GetRole(), "swarm-")
	info.Expires, info.Uses, info.Used = t.GetExpires(), t.GetUses(), t.GetUsed()
	info.Void = pki.Void(t, s.Cluster().GetRootCa(), now)
	return info
}

// ListTokens describes all limited tokens, those that end first before the others.
func (o *Tokens) ListTokens(ctx context.Context, _ *skepv1.ListTokensRequest) (*skepv1.ListTokensResponse, error) {
	s, err := o.state.Read(ctx)
	if err != nil {
		return nil, fail(err)
	}
	resp := new(skepv1.ListTokensResponse)
	for _, r := range tokens(s) {
		resp.Tokens = append(resp.Tokens, tokenInfo(s, r, time.Now()))
	}
	slices.SortFunc(resp.Tokens, func(a, b *skepv1.TokenInfo) int {
		return cmp.Or(a.GetExpires().AsTime().Compare(b.GetExpires().AsTime()), cmp.Compare(a.GetId(), b.GetId()))
	})
	return resp, nil
}

// RemoveToken makes a limited token void.
func (o *Tokens) RemoveToken(ctx context.Context, req *skepv1.RemoveTokenRequest) (*skepv1.RemoveTokenResponse, error) {
	if err := needID(req.GetId()); err != nil {
		return nil, fail(err)
	}
	resp := new(skepv1.RemoveTokenResponse)
	_, err := o.state.Update(ctx, func(tx *store.Tx) error {
		var found []string
		for _, r := range tokens(tx.Snapshot()) {
			if strings.HasPrefix(r.GetId(), req.GetId()) {
				found = append(found, r.GetId())
			}
		}
		switch len(found) {
		case 0:
			return notFound("join token", req.GetId())
		case 1:
			resp.Id = found[0]
			return tx.Remove(model.Resources, found[0])
		default:
			return invalid("join token %s is ambiguous (%d matches found)", req.GetId(), len(found))
		}
	})
	if err != nil {
		return nil, fail(err)
	}
	return resp, nil
}
