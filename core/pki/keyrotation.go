package pki

import (
	"io"
	"time"

	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/store"
)

// RotationKind is the kind, and the name, of the resource that says when network keys were
// rotated and whether they are to be.
const RotationKind = "skep.key-rotation"

const (
	// rotateEvery is how long a key is the newest.
	rotateEvery = 12 * time.Hour
	// rotateApart is how long a rotation waits for nodes that have not taken up the one before.
	rotateApart = 2 * time.Minute

	// RotateOne changes the key that new sessions of WireGuard begin with. It is enough when a
	// node was removed: of ESP's keys that one knew only those that others talked to it by.
	RotateOne = 1
	// RotateAll leaves no node sending by a key that was there when it was asked for: ESP sends by
	// the second newest.
	RotateAll = 2
)

// Rotation returns what the swarm keeps of rotations; never nil.
func Rotation(s *store.Snapshot) *skepv1.KeyRotation {
	_, r := rotation(s)
	return r
}

func rotation(s *store.Snapshot) (*api.Resource, *skepv1.KeyRotation) {
	out := new(skepv1.KeyRotation)
	r, _ := s.OnlyOf(RotationKind)
	if r == nil {
		return nil, out
	}
	if r.GetPayload().UnmarshalTo(out) != nil {
		out = new(skepv1.KeyRotation) // as if nothing had been asked for
	}
	return r, out
}

// AskRotation asks the leader for n rotations of the keys of encrypted networks. More than one
// wish at a time is met by the same rotations.
func AskRotation(tx *store.Tx, random io.Reader, n uint32) error {
	r := Rotation(tx.Snapshot())
	if r.GetWanted() >= n {
		return nil
	}
	return putRotation(tx, random, &skepv1.KeyRotation{Rotated: r.GetRotated(), Wanted: n})
}

// StartRotation notes since when the newest key is there, as far as anybody knows.
func StartRotation(tx *store.Tx, random io.Reader, at time.Time) error {
	return putRotation(tx, random, &skepv1.KeyRotation{Rotated: timestamppb.New(at), Wanted: Rotation(tx.Snapshot()).GetWanted()})
}

// Rotated notes that keys were rotated at a time.
func Rotated(tx *store.Tx, random io.Reader, at time.Time) error {
	r := Rotation(tx.Snapshot())
	return putRotation(tx, random, &skepv1.KeyRotation{Rotated: timestamppb.New(at), Wanted: r.GetWanted() - min(1, r.GetWanted())})
}

func putRotation(tx *store.Tx, random io.Reader, now *skepv1.KeyRotation) error {
	payload, err := anypb.New(now)
	if err != nil {
		return model.Wrap(model.Internal, err, "write rotation of keys")
	}
	if r, _ := rotation(tx.Snapshot()); r != nil {
		r = model.Clone(r)
		r.Payload = payload
		return tx.Update(r)
	}
	return tx.CreateOnly(random, RotationKind, "when the keys of encrypted networks change, see skep net rotate-keys", payload)
}

// RotationDue returns when keys are to be rotated, and until when that waits for nodes that have
// not taken up the last rotation: whoever is two behind can be heard by nobody.
func RotationDue(r *skepv1.KeyRotation, now time.Time) (due, settled time.Time) {
	last := time.Time{}
	if r.GetRotated() != nil {
		last = r.GetRotated().AsTime()
	}
	if last.Sub(now) > rotateApart { // a leader's clock was wrong: nobody knows when it was
		return now, now.Add(rotateApart)
	}
	settled = last.Add(rotateApart)
	if r.GetWanted() > 0 {
		return last, settled
	}
	return last.Add(rotateEvery), settled
}
