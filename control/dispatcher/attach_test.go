package dispatcher

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/control/replica"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/store"
)

func TestAttachNetwork(t *testing.T) {
	state := replica.NewMemory(store.Empty())
	named := func(id, name string, attachable bool) *api.Network {
		return &api.Network{Id: id, Spec: &api.NetworkSpec{Annotations: &api.Annotations{Name: name}, Attachable: attachable}}
	}
	if _, err := state.Update(t.Context(), func(tx *store.Tx) error {
		for _, o := range []model.Object{
			&api.Node{Id: "n1"}, &api.Node{Id: "n2"}, named("open", "front", true), named("shut", "back", false), &api.Task{Id: "service", NodeId: "n1"},
		} {
			if err := tx.Create(o); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	caller := "n1"
	d := New(Config{State: state, Log: slog.New(slog.DiscardHandler), Caller: func(context.Context) (string, string, error) { return caller, "", nil }})
	taken := false // what the allocator says of the address
	allocate(t, state, func(task *api.Task) {
		task.Networks = []*api.NetworkAttachment{{Aliases: task.GetSpec().GetNetworks()[0].GetAliases()}}
		if task.Status.State = api.TaskState_PENDING; taken {
			task.Status = &api.TaskStatus{State: api.TaskState_NEW, Err: "the requested address is in use"}
		}
	})
	attach := func(target string) (string, error) {
		resp, err := d.AttachNetwork(t.Context(), &api.AttachNetworkRequest{
			ContainerId: "c1", Config: &api.NetworkAttachmentConfig{Target: target, Addresses: []string{"10.0.0.9"}, Aliases: []string{"box"}},
		})
		return resp.GetAttachmentId(), err
	}
	for target, want := range map[string]codes.Code{"": codes.InvalidArgument, "nope": codes.NotFound, "back": codes.PermissionDenied, "shut": codes.PermissionDenied} {
		if _, err := attach(target); status.Code(err) != want {
			t.Errorf("%q: %v, want %s", target, err, want)
		}
	}
	if _, err := state.Update(t.Context(), func(tx *store.Tx) error {
		sealed := named("sealed", "vault", true)
		sealed.Spec.DriverConfig = &api.Driver{Options: map[string]string{model.EncryptedOption: ""}}
		return errors.Join(tx.Create(sealed), tx.Create(&api.Node{Id: "docker", Description: &api.NodeDescription{Engine: new(api.EngineDescription)}}))
	}); err != nil {
		t.Fatal(err)
	}
	caller = "docker"
	if _, err := attach("vault"); status.Code(err) != codes.FailedPrecondition || status.Convert(err).Message() != "network vault is encrypted and does not reach Docker Engine" {
		t.Errorf("an encrypted network on a Docker Engine: %v", err)
	}
	caller = "n1"
	id, err := attach("front")
	if err != nil {
		t.Fatal(err)
	}
	task := state.View().Task(id)
	if got := task.GetSpec().GetNetworks(); len(got) != 1 || got[0].GetTarget() != "open" || got[0].GetAddresses()[0] != "10.0.0.9" || got[0].GetAliases()[0] != "box" ||
		task.GetNodeId() != "n1" || task.GetSpec().GetAttachment().GetContainerId() != "c1" || task.GetDesiredState() != api.TaskState_RUNNING {
		t.Errorf("task %v", task)
	}
	many, long := slices.Repeat([]string{"a"}, maxNames+1), []string{strings.Repeat("a", maxNameBytes+1)}
	for _, names := range [][]string{many, long} {
		_, err := d.AttachNetwork(t.Context(), &api.AttachNetworkRequest{ContainerId: "c2", Config: &api.NetworkAttachmentConfig{Target: "front", Aliases: names}})
		_, renameErr := d.Networks().RenameAttachments(t.Context(), &skepv1.RenameAttachmentsRequest{
			Attachments: []*skepv1.AttachmentNames{{AttachmentId: id, Aliases: names}},
		})
		for _, err := range []error{err, renameErr} {
			if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "at most") {
				t.Errorf("%d names, the first one of %d bytes: %v", len(names), len(names[0]), err)
			}
		}
	}
	taken = true
	if _, err := attach("front"); status.Code(err) != codes.FailedPrecondition || status.Convert(err).Message() != "the requested address is in use" {
		t.Errorf("an address that is taken: %v", err)
	}
	for task := range state.View().Tasks() {
		if task.GetSpec().GetAttachment() != nil && task.GetId() != id {
			t.Errorf("the refused attachment is left: %v", task)
		}
	}
	rename := func(ids ...string) codes.Code {
		req := new(skepv1.RenameAttachmentsRequest)
		for _, id := range ids {
			req.Attachments = append(req.Attachments, &skepv1.AttachmentNames{AttachmentId: id, Aliases: []string{"chest", "lid"}})
		}
		_, err := d.Networks().RenameAttachments(t.Context(), req)
		return status.Code(err)
	}
	if code := rename(id, "service"); code != codes.NotFound || state.View().Task(id).GetSpec().GetNetworks()[0].GetAliases()[0] != "box" {
		t.Errorf("of what is no attachment: %s, and the other one is %v", code, state.View().Task(id))
	}
	if code := rename(id); code != codes.OK {
		t.Errorf("rename: %s", code)
	}
	version := state.View().Task(id).GetMeta().GetVersion().GetIndex()
	if code := rename(id); code != codes.OK || state.View().Task(id).GetMeta().GetVersion().GetIndex() != version {
		t.Errorf("renamed to what it is called: %s, a new version %t", code, state.View().Task(id).GetMeta().GetVersion().GetIndex() != version)
	}
	task = state.View().Task(id)
	for _, got := range [][]string{task.GetSpec().GetNetworks()[0].GetAliases(), task.GetNetworks()[0].GetAliases()} {
		if !slices.Equal(got, []string{"chest", "lid"}) {
			t.Errorf("renamed to %q", got)
		}
	}
	detach := func(id string) codes.Code {
		_, err := d.DetachNetwork(t.Context(), &api.DetachNetworkRequest{AttachmentId: id})
		return status.Code(err)
	}
	caller = "n2"
	if code := rename(id); code != codes.PermissionDenied {
		t.Errorf("another node's renamed: %s", code)
	}
	if code := detach(id); code != codes.PermissionDenied {
		t.Errorf("another node's: %s", code)
	}
	caller = "n1"
	for _, tt := range []struct {
		id   string
		want codes.Code
	}{{"", codes.InvalidArgument}, {"service", codes.NotFound}, {id, codes.OK}, {id, codes.NotFound}} {
		if code := detach(tt.id); code != tt.want {
			t.Errorf("%q: %s, want %s", tt.id, code, tt.want)
		}
	}
}

// allocate decides about new attachments until the test ends.
func allocate(t *testing.T, state *replica.Memory, decide func(*api.Task)) {
	t.Helper()
	cursor := state.Follow()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	t.Cleanup(func() { cancel(); <-done })
	go func() {
		defer close(done)
		for {
			events, _, err := cursor.Next(ctx)
			if err != nil {
				return
			}
			for _, e := range events {
				task, _ := e.New.(*api.Task)
				if e.Old != nil || task.GetSpec().GetAttachment() == nil {
					continue
				}
				if _, err := state.Update(ctx, func(tx *store.Tx) error {
					task = model.Clone(task)
					decide(task)
					return tx.Update(task)
				}); err != nil {
					t.Errorf("allocate: %v", err)
				}
			}
		}
	}()
}
