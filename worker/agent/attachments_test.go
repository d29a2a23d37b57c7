package agent

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime"
)

func (m *manager) AttachNetwork(_ context.Context, req *api.AttachNetworkRequest) (*api.AttachNetworkResponse, error) {
	if req.GetConfig().GetTarget() == "closed" {
		return nil, status.Error(codes.PermissionDenied, "network closed not manually attachable")
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.asked = append(m.asked, req)
	return &api.AttachNetworkResponse{AttachmentId: "a1"}, nil
}

func (m *manager) DetachNetwork(_ context.Context, req *api.DetachNetworkRequest) (*api.DetachNetworkResponse, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.detached = append(m.detached, req.GetAttachmentId())
	return new(api.DetachNetworkResponse), nil
}

func (o overlaysOf) RenameAttachments(_ context.Context, req *skepv1.RenameAttachmentsRequest) (*skepv1.RenameAttachmentsResponse, error) {
	o.r.m.mu.Lock()
	defer o.r.m.mu.Unlock()
	o.r.m.renamed = req.GetAttachments()
	return new(skepv1.RenameAttachmentsResponse), o.r.m.renameErr
}

func (m *manager) wasDetached(id string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Contains(m.detached, id)
}

// refusing is the container by which wires connect nobody.
const refusing = "refusing"

var errWires = errors.New("the wires are cut")

// wires is a network that connects everybody at once.
type wires map[string][]runtime.OverlayRequest

func (w wires) Attach(_ context.Context, req runtime.SandboxRequest) (runtime.Sandbox, error) {
	if _, refuses := w[refusing]; refuses {
		return runtime.Sandbox{}, errWires
	}
	w[req.ContainerID] = req.Overlays
	return runtime.Sandbox{Attached: req.Overlays}, nil
}

func (w wires) Detach(_ context.Context, id string) error {
	delete(w, id)
	return nil
}

func (w wires) Retain(context.Context, []string) error { return nil }

// attachment is the task that a manager makes for a container on network n1.
func attachment(id, container, addr string) *api.Task {
	return &api.Task{
		Id: id, NodeId: "n1", DesiredState: api.TaskState_RUNNING, Status: &api.TaskStatus{State: api.TaskState_ASSIGNED},
		Spec: &api.TaskSpec{Runtime: &api.TaskSpec_Attachment{Attachment: &api.NetworkAttachmentSpec{ContainerId: container}}},
		Networks: []*api.NetworkAttachment{{
			Network:   &api.Network{Id: "n1", Spec: &api.NetworkSpec{Annotations: &api.Annotations{Name: "net"}}},
			Addresses: []string{addr},
		}},
	}
}

func withAttachments(t *testing.T, test func(r *rig, w wires)) {
	t.Helper()
	inBubble(t, func(r *rig) {
		w := wires{}
		r.halt()
		r.attachments = NewAttachments(w, nil)
		r.start()
		if err := r.attachments.Retain(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		test(r, w)
	})
}

const box = "0123456789abcdef"

// begin attaches a container to network net and returns what came of it.
func (r *rig) begin(network string) <-chan error {
	done := make(chan error, 1)
	go func() {
		_, err := r.attachments.Attach(r.Context(), runtime.SandboxRequest{
			ContainerID: box, Name: "/box", Hostname: "h", Mode: "bridge",
			Overlays: []runtime.OverlayRequest{{Name: network, Aliases: []string{"x"}, Wanted: []netip.Addr{netip.MustParseAddr("10.0.0.9")}}},
		})
		done <- err
	}()
	synctest.Wait()
	return done
}

func TestAContainerGetsItsPlaceAndGivesItBack(t *testing.T) {
	withAttachments(t, func(r *rig, w wires) {
		done := r.begin("net")
		r.assign(attachment("a1", box, "10.0.0.9/24"))
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		asked := r.m.asked[0]
		if d := cmp.Diff([]string{"0123456789ab", "box", "h", "x"}, asked.GetConfig().GetAliases()); d != "" || asked.GetContainerId() != box ||
			!slices.Equal(asked.GetConfig().GetAddresses(), []string{"10.0.0.9"}) {
			t.Errorf("asked for %v\n%s", asked, d)
		}
		want := []runtime.OverlayRequest{{NetworkID: "n1", Name: "net", Address: netip.MustParsePrefix("10.0.0.9/24"), Aliases: []string{"x"}}}
		if d := cmp.Diff(want, w[box], cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); d != "" {
			t.Error(d)
		}
		r.settle()
		r.want("a1", api.TaskState_RUNNING, 0, 0)
		r.lose()
		if r.m.wasDetached("a1") {
			t.Error("a lost session took the container's place away")
		}
		if err := r.attachments.Detach(t.Context(), box); err != nil {
			t.Fatal(err)
		}
		r.settle()
		if !r.m.wasDetached("a1") {
			t.Error("the place of a container that has ended was not given back")
		}
		r.assign()
		if len(w) != 0 {
			t.Errorf("still connected: %v", w)
		}
	})
}

// The names of a container that was renamed are told for the places that it asked for, and
// nobody is asked for a container that has none.
func TestARenamedContainerTellsItsNames(t *testing.T) {
	withAttachments(t, func(r *rig, w wires) {
		rename := func(id string) error {
			_, err := r.attachments.Attach(r.Context(), runtime.SandboxRequest{
				ContainerID: id, Name: "/new", Former: "box", Hostname: "h", Mode: "bridge",
				Overlays: []runtime.OverlayRequest{{NetworkID: "n1", Name: "net", Address: netip.MustParsePrefix("10.0.0.9/24"), Aliases: []string{"x"}}},
			})
			return err
		}
		done := r.begin("net")
		r.assign(attachment("a1", box, "10.0.0.9/24"))
		if err := errors.Join(<-done, rename(box), rename("task"+box)); err != nil {
			t.Fatal(err)
		}
		told := func(when, name string) {
			t.Helper()
			want := []*skepv1.AttachmentNames{{AttachmentId: "a1", Aliases: slices.Sorted(slices.Values([]string{"0123456789ab", "h", name, "x"}))}}
			if d := cmp.Diff(want, r.m.renamed, protocmp.Transform()); d != "" {
				t.Errorf("%s: %s", when, d)
			}
		}
		told("renamed", "new")
		w[refusing] = nil
		if err := rename(box); !errors.Is(err, errWires) {
			t.Errorf("a name that the node could not take: %v", err)
		}
		told("not renamed by the node", "box")
		delete(w, refusing)
		for code, kind := range map[codes.Code]model.Kind{codes.Internal: model.Unavailable, codes.InvalidArgument: model.Invalid} {
			r.m.renamed, r.m.renameErr = nil, status.Error(code, "no")
			if err := rename(box); model.KindOf(err) != kind {
				t.Errorf("a name that could not be told: %v", err)
			}
			if code == codes.Internal { // it may have been noted
				told("not certain", "box")
			}
		}
		r.m.renameErr = status.Error(codes.Unimplemented, "unknown method")
		if err := rename(box); err != nil {
			t.Errorf("of managers that cannot rename: %v", err)
		}
	})
}

func TestPlacesAreRefused(t *testing.T) {
	withAttachments(t, func(r *rig, w wires) {
		if err := <-r.begin("closed"); model.KindOf(err) != model.Denied ||
			err.Error() != "Could not attach to network closed: rpc error: code = PermissionDenied desc = network closed not manually attachable" {
			t.Errorf("a network that is not attachable: %v", err)
		}
		done := r.begin("net") // and no address comes
		time.Sleep(attachWait + time.Second)
		if err := <-done; model.KindOf(err) != model.Unavailable {
			t.Errorf("no address in time: %v", err)
		}
		r.assign(attachment("a1", box, "10.0.0.9/24")) // too late
		if !r.m.wasDetached("a1") {
			t.Error("a place that came too late was kept")
		}
		if len(w) != 0 {
			t.Errorf("connected: %v", w)
		}
		r.halt()
		if err := <-r.begin("net"); model.KindOf(err) != model.NotFound {
			t.Errorf("outside of a swarm: %v", err)
		}
		r.start()
	})
}

// A restarted daemon keeps the places of containers that still run, and no others.
func TestPlacesOutliveTheDaemon(t *testing.T) {
	withAttachments(t, func(r *rig, w wires) {
		r.assign(attachment("a1", box, "10.0.0.9/24"), attachment("a2", "gone", "10.0.0.8/24"))
		r.halt()
		r.m.detached = nil
		r.attachments = NewAttachments(w, nil)
		r.start()
		r.settle()
		if len(r.m.detached) != 0 {
			t.Fatal("places were given back before the containers were known")
		}
		if _, err := r.attachments.Attach(t.Context(), runtime.SandboxRequest{ContainerID: box, Overlays: []runtime.OverlayRequest{
			{NetworkID: "n1", Name: "net", Address: netip.MustParsePrefix("10.0.0.9/24")},
		}}); err != nil {
			t.Fatal(err)
		}
		if err := r.attachments.Retain(t.Context(), []string{box}); err != nil {
			t.Fatal(err)
		}
		r.settle()
		if r.m.wasDetached("a1") || !r.m.wasDetached("a2") {
			t.Errorf("given back: %v, want a2 only", r.m.detached)
		}
		r.want("a1", api.TaskState_RUNNING, 0, 0)
	})
}
