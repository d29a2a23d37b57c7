package ops

import (
	"context"
	"crypto/rand"
	"io"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/control/replica"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/store"
	"github.com/skep-dev/skep/platform/cfssl"
)

// Membership is what ops needs to know of raft's members.
type Membership interface {
	// Members lists the members of raft with their status as this leader sees it. It is
	// never called inside a transaction.
	Members() []*api.RaftMember
	// Voters lists those of them that have a vote.
	Voters() []*api.RaftMember
}

// Config says what an Ops works on.
type Config struct {
	// State is the replicated state; it must be set.
	State replica.State
	// Membership must be set.
	Membership Membership
	// SecretDriver checks that a secret driver of this name is there; nil means that none is.
	SecretDriver func(ctx context.Context, name string) error
	// External reaches external CAs; nil refuses them.
	External *cfssl.Client
	// Random is the source of ids and tokens; nil means crypto/rand.
	Random io.Reader
}

// Ops executes use cases. It implements api.ControlServer.
type Ops struct {
	api.UnimplementedControlServer

	state   replica.State
	members Membership
	random  io.Reader
	// secretDriver is nil when there are no drivers.
	secretDriver func(ctx context.Context, name string) error
	// external may be nil.
	external *cfssl.Client
}

// New returns an Ops on a state.
func New(config Config) *Ops {
	if config.Random == nil {
		config.Random = rand.Reader
	}
	return &Ops{
		state: config.State, members: config.Membership, random: config.Random, external: config.External, secretDriver: config.SecretDriver,
	}
}

func (o *Ops) newID() (string, error) { return model.NewID(o.random) }

// update runs one transaction.
func (o *Ops) update(ctx context.Context, fn func(*store.Tx) error) error {
	_, err := o.state.Update(ctx, fn)
	return err
}

func invalid(format string, args ...any) error {
	return model.Errorf(model.Invalid, format, args...)
}

func notFound(what, id string) error {
	return model.Errorf(model.NotFound, "%s %s not found", what, id)
}

// needID refuses the empty id of a request.
func needID(id string) error {
	if id == "" {
		return invalid("no object id given")
	}
	return nil
}

// needUpdate refuses an update request without id, version or spec.
func needUpdate(id string, version *api.Version, hasSpec bool) error {
	if err := needID(id); err != nil {
		return err
	}
	if version == nil || !hasSpec {
		return invalid("an update needs the object's version and a spec")
	}
	return nil
}

// at returns a clone's meta with the version that the caller read, so that the store
// compares it.
func at(meta *api.Meta, version *api.Version) *api.Meta {
	m := model.Clone(meta)
	if m == nil {
		m = new(api.Meta)
	}
	m.Version = model.Clone(version)
	return m
}
