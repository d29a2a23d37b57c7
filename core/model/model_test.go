package model

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/big"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/testing/protocmp"
	"pgregory.net/rapid"

	"github.com/skep-dev/skep/api"
)

// TestNewID holds ids to their construction: 17 bytes, the top bit set, base 36, the first
// character dropped.
func TestNewID(t *testing.T) {
	id, err := NewID(bytes.NewReader(make([]byte, 17)))
	if err != nil {
		t.Fatal(err)
	}
	want := new(big.Int).Lsh(big.NewInt(1), 135).Text(36)[1:26]
	if id != want {
		t.Errorf("id of zeros: %s, want %s", id, want)
	}
	form := regexp.MustCompile(`^[0-9a-z]{25}$`)
	rapid.Check(t, func(t *rapid.T) {
		random := rapid.SliceOfN(rapid.Byte(), 17, 17).Draw(t, "random")
		id, err := NewID(bytes.NewReader(random))
		if err != nil || !form.MatchString(id) {
			t.Fatalf("id %q, %v", id, err)
		}
		if again, _ := NewID(bytes.NewReader(random)); again != id {
			t.Fatalf("the same bytes give %s and %s", id, again)
		}
	})
	if _, err := NewID(bytes.NewReader(make([]byte, 16))); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("too few random bytes: %v", err)
	}
}

// TestTransitions holds the table's sentences: states never sink, nothing leaves an end,
// and each component does its own part only.
func TestTransitions(t *testing.T) {
	type move struct{ from, to api.TaskState }
	by := make(map[move][]Actor)
	for _, tr := range Transitions() {
		m := move{tr.From, tr.To}
		if slices.Contains(by[m], tr.By) {
			t.Errorf("%s to %s by %d is listed twice", tr.From, tr.To, tr.By)
		}
		by[m] = append(by[m], tr.By)
		if tr.To <= tr.From {
			t.Errorf("%s sinks to %s", tr.From, tr.To)
		}
		if Terminal(tr.From) {
			t.Errorf("%s is an end, and leads to %s", tr.From, tr.To)
		}
		if tr.From == api.TaskState_REMOVE || tr.To == api.TaskState_REMOVE {
			t.Errorf("%s to %s: remove is a wish, not a state", tr.From, tr.To)
		}
	}
	for _, c := range []struct {
		from, to api.TaskState
		want     []Actor
	}{
		{api.TaskState_NEW, api.TaskState_PENDING, []Actor{Allocator}},
		{api.TaskState_NEW, api.TaskState_ASSIGNED, nil},
		{api.TaskState_PENDING, api.TaskState_ASSIGNED, []Actor{Scheduler}},
		{api.TaskState_PENDING, api.TaskState_SHUTDOWN, []Actor{Scheduler}},
		{api.TaskState_PENDING, api.TaskState_RUNNING, nil},
		{api.TaskState_ASSIGNED, api.TaskState_ACCEPTED, []Actor{Agent}},
		{api.TaskState_ASSIGNED, api.TaskState_RUNNING, []Actor{Agent}},
		{api.TaskState_ACCEPTED, api.TaskState_PREPARING, []Actor{Agent}},
		{api.TaskState_PREPARING, api.TaskState_READY, []Actor{Agent}},
		{api.TaskState_READY, api.TaskState_STARTING, []Actor{Agent}},
		{api.TaskState_STARTING, api.TaskState_RUNNING, []Actor{Agent}},
		{api.TaskState_RUNNING, api.TaskState_COMPLETE, []Actor{Agent}},
		{api.TaskState_RUNNING, api.TaskState_FAILED, []Actor{Agent}},
		{api.TaskState_RUNNING, api.TaskState_SHUTDOWN, []Actor{Agent}},
		{api.TaskState_RUNNING, api.TaskState_REJECTED, []Actor{Agent, Enforcer}},
		{api.TaskState_RUNNING, api.TaskState_ORPHANED, []Actor{Dispatcher}},
		{api.TaskState_RUNNING, api.TaskState_STARTING, nil},
		{api.TaskState_COMPLETE, api.TaskState_RUNNING, nil},
		{api.TaskState_SHUTDOWN, api.TaskState_ORPHANED, nil},
	} {
		if diff := cmp.Diff(c.want, by[move{c.from, c.to}]); diff != "" {
			t.Errorf("%s to %s (-want +table): %s", c.from, c.to, diff)
		}
	}
	// Every live state leads to an end, so that no task is kept for ever.
	for value := range api.TaskState_name {
		from := api.TaskState(value)
		ends := slices.ContainsFunc(Transitions(), func(tr Transition) bool { return tr.From == from })
		if ends == Terminal(from) {
			t.Errorf("%s: is an end %v, leads on %v", from, Terminal(from), ends)
		}
	}
}

func TestStateNames(t *testing.T) {
	for state, want := range map[api.TaskState]string{
		api.TaskState_NEW: "new", api.TaskState_RUNNING: "running", api.TaskState_ORPHANED: "orphaned",
	} {
		if got := StateName(state); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
	for state, want := range map[api.TaskState]bool{
		api.TaskState_NEW: false, api.TaskState_RUNNING: false, api.TaskState_COMPLETE: true, api.TaskState_REMOVE: true, api.TaskState_ORPHANED: true,
	} {
		if got := Terminal(state); got != want {
			t.Errorf("%s is an end: %v", state, got)
		}
	}
}

// objects has one record of each table, in the order of the tables.
func objects() []Object {
	return []Object{
		&api.Node{Id: "1"}, &api.Service{Id: "2"}, &api.Network{Id: "3"}, &api.Task{Id: "4"}, &api.Cluster{Id: "5"},
		&api.Secret{Id: "6"}, &api.Resource{Id: "7"}, &api.Extension{Id: "8"}, &api.Config{Id: "9"}, &api.Volume{Id: "10"},
	}
}

func TestTables(t *testing.T) {
	list := objects()
	if len(list) != TableCount {
		t.Fatalf("%d tables, this test knows %d", TableCount, len(list))
	}
	for i, o := range list {
		name := strings.ToLower(string(o.ProtoReflect().Descriptor().Name()))
		if TableOf(o) != Table(i) || Table(i).String() != name {
			t.Errorf("%s is in table %d, %s", name, TableOf(o), Table(i))
		}
	}
	for _, foreign := range []Table{-1, Table(TableCount)} {
		if foreign.String() != "unknown" {
			t.Errorf("table %d is called %s", foreign, foreign)
		}
	}
	defer func() {
		if recover() == nil {
			t.Error("a foreign object has a table")
		}
	}()
	TableOf(foreignObject{&api.Task{}})
}

type foreignObject struct{ *api.Task }

func TestEventID(t *testing.T) {
	if id := (Event{Kind: Create, New: &api.Node{Id: "new"}}).ID(); id != "new" {
		t.Error(id)
	}
	if id := (Event{Kind: Remove, Old: &api.Node{Id: "old"}}).ID(); id != "old" {
		t.Error(id)
	}
}

// TestCloneKeepsUnknownFields edits each kind of record as deciders do and expects what a
// newer version wrote to survive, at the top and within.
func TestCloneKeepsUnknownFields(t *testing.T) {
	newer := []byte{0xfa, 0x3f, 0x03, 'n', 'e', 'w'} // field 1023, bytes
	for _, o := range objects() {
		fill(o.ProtoReflect(), newer, 2)
		wire, err := proto.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		stored := o.ProtoReflect().New().Interface()
		if err := proto.Unmarshal(wire, stored); err != nil {
			t.Fatal(err)
		}
		edited := Clone(stored)
		fields := edited.ProtoReflect().Descriptor().Fields()
		edited.ProtoReflect().Set(fields.ByName("id"), protoreflect.ValueOfString("edited"))
		rewritten, err := proto.Marshal(edited)
		if err != nil {
			t.Fatal(err)
		}
		if got, want := bytes.Count(rewritten, newer), bytes.Count(wire, newer); got != want || want < 2 {
			t.Errorf("%s: %d of %d unknown fields are left after an edit", fields.ByName("id").Parent().Name(), got, want)
		}
		if diff := cmp.Diff(o, stored, protocmp.Transform()); diff != "" {
			t.Errorf("the stored record changed:\n%s", diff)
		}
	}
}

// fill puts an unknown field into a message and those within, down to a depth.
func fill(m protoreflect.Message, unknown []byte, depth int) {
	m.SetUnknown(unknown)
	if depth == 0 {
		return
	}
	for i := range m.Descriptor().Fields().Len() {
		if f := m.Descriptor().Fields().Get(i); f.Message() != nil && !f.IsList() && !f.IsMap() {
			fill(m.Mutable(f).Message(), unknown, depth-1)
		}
	}
}

func TestErrors(t *testing.T) {
	cause := errors.New("cause")
	wrapped := Wrap(NotFound, cause, "read node")
	if wrapped.Error() != "read node: cause" || KindOf(wrapped) != NotFound || !errors.Is(wrapped, cause) {
		t.Errorf("%v of kind %d", wrapped, KindOf(wrapped))
	}
	if Wrap(NotFound, nil, "read node") != nil {
		t.Error("nothing was wrapped into something")
	}
	if got := Wrap(Invalid, cause, "").Error(); got != "cause" {
		t.Error(got)
	}
	outer := fmt.Errorf("outer: %w", Errorf(Denied, "node %s may not", "n1"))
	if KindOf(outer) != Denied || outer.Error() != "outer: node n1 may not" {
		t.Errorf("%v of kind %d", outer, KindOf(outer))
	}
	if KindOf(cause) != Internal || KindOf(nil) != Internal {
		t.Error("foreign errors are internal")
	}
	if through := Errorf(Invalid, "read: %w", cause); !errors.Is(through, cause) {
		t.Error("Errorf loses the cause that it was given")
	}
	for _, c := range []struct {
		err, target error
		want        bool
	}{
		{ErrSequence, ErrSequence, true},
		{Errorf(Conflict, "update out of sequence"), ErrSequence, true},
		{Errorf(Conflict, "other"), ErrSequence, false},
		{Errorf(Conflict, "other"), &Error{Kind: Conflict}, true},
		{Errorf(Invalid, "other"), &Error{Kind: Conflict}, false},
		{fmt.Errorf("propose: %w", ErrNoLeader), ErrNoLeader, true},
		{cause, ErrNoLeader, false},
	} {
		if errors.Is(c.err, c.target) != c.want {
			t.Errorf("%v is %v: %v", c.err, c.target, !c.want)
		}
	}
}

func TestPlanAdd(t *testing.T) {
	at := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	p := Plan{Changes: []Change{{Kind: Create, Object: &api.Task{Id: "a"}}}, Wake: at.Add(time.Hour)}
	p.Add(Plan{Changes: []Change{{Kind: Remove, Object: &api.Task{Id: "b"}}}, Wake: at, Notes: []Note{{"b", "gone"}}})
	if len(p.Changes) != 2 || p.Changes[1].Object.GetId() != "b" || len(p.Notes) != 1 || !p.Wake.Equal(at) {
		t.Errorf("%v", p)
	}
	for _, c := range [][3]time.Time{{{}, {}, {}}, {at, {}, at}, {{}, at, at}, {at, at.Add(1), at}, {at.Add(1), at, at}} {
		if got := Earlier(c[0], c[1]); !got.Equal(c[2]) {
			t.Errorf("earlier of %v and %v: %v", c[0], c[1], got)
		}
	}
}
