package dispatcher

import (
	"bytes"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/netplan"
	"github.com/skep-dev/skep/core/store"
)

func anOverlay(id, name string) *api.Network {
	return &api.Network{
		Id: id, Spec: &api.NetworkSpec{Annotations: &api.Annotations{Name: name}},
		DriverState: &api.Driver{Name: "overlay", Options: map[string]string{"com.docker.network.driver.overlay.vxlanid_list": "4097"}},
		Ipam:        &api.IPAMOptions{Configs: []*api.IPAMConfig{{Subnet: "10.0.1.0/24", Gateway: "10.0.1.1"}}},
	}
}

func (r *rig) watch(node, session string) *call[skepv1.NetworkUpdate] {
	return open(r, node, func(s *stream[skepv1.NetworkUpdate]) error {
		return r.d.Networks().Watch(&skepv1.WatchNetworksRequest{SessionId: session}, s)
	})
}

// check asks all nodes and returns where the answer will be.
func (r *rig) check(target string) (<-chan *skepv1.CheckNetworksResponse, <-chan error) {
	got, errs := make(chan *skepv1.CheckNetworksResponse, 1), make(chan error, 1)
	go func() {
		resp, err := r.d.Networks().Check(r.Context(), &skepv1.CheckNetworksRequest{Target: target})
		got <- resp
		errs <- err
	}()
	synctest.Wait()
	return got, errs
}

func TestCheckAsksAllNodes(t *testing.T) {
	inTerm(t, func(r *rig) {
		_, id := r.register("n1")
		r.register("n2") // opens no stream of networks
		w := r.watch("n1", id)
		known := netplan.NewState()
		known.Merge(w.next())
		got, errs := r.check("")
		u := w.next()
		known.Merge(u)
		if u.GetCheck().GetId() == "" || !bytes.Equal(u.GetCheck().GetDigest(), netplan.Digest(known.Snapshot())) {
			t.Fatalf("asked %v of a node that knows everything", u.GetCheck())
		}
		answer := &skepv1.CheckedRequest{SessionId: id, CheckId: u.GetCheck().GetId(), Differences: []*skepv1.NetworkDifference{
			{Kind: "link", NetworkIds: []string{"back"}, Text: "bridge is missing", Mended: true},
			{Kind: "rules", NetworkIds: []string{"front"}, Text: "rules differ"},
		}}
		if _, err := r.d.Networks().Checked(r.as("n1"), answer); err != nil {
			t.Fatal(err)
		}
		resp := <-got
		if err := <-errs; err != nil || len(resp.GetNodes()) != 2 {
			t.Fatalf("%v, %v", resp, err)
		}
		one, two := resp.GetNodes()[0], resp.GetNodes()[1]
		if one.GetNodeName() != "host of n1" || one.GetUnchecked() != "" || len(one.GetDifferences()) != 2 || one.GetDifferences()[0].GetNetworkNames()[0] != "rear" {
			t.Errorf("n1: %v", one)
		}
		if !two.GetMissing() || two.GetUnchecked() != "no answer" {
			t.Errorf("n2: %v", two)
		}
		// Only what concerns one network.
		got, errs = r.check("rear")
		answer.CheckId = w.next().GetCheck().GetId()
		if _, err := r.d.Networks().Checked(r.as("n1"), answer); err != nil {
			t.Fatal(err)
		}
		if one := (<-got).GetNodes()[0]; len(one.GetDifferences()) != 1 || <-errs != nil {
			t.Errorf("of one network: %v", one)
		}
		_, errs = r.check("nowhere")
		wantStatus(t, <-errs, codes.NotFound, "there is no network or service nowhere")
		// A node that knows something else is told everything again.
		got, errs = r.check("")
		answer = &skepv1.CheckedRequest{SessionId: id, CheckId: w.next().GetCheck().GetId(), Differences: []*skepv1.NetworkDifference{{Kind: "state", Text: "other"}}}
		if _, err := r.d.Networks().Checked(r.as("n1"), answer); err != nil {
			t.Fatal(err)
		}
		if one := (<-got).GetNodes()[0]; len(one.GetDifferences()) != 1 || !one.GetDifferences()[0].GetMended() || <-errs != nil {
			t.Errorf("another state: %v", one)
		}
		w.ended(codes.Aborted, "the node's networks must be told anew")
		w = r.watch("n1", id)
		if !w.next().GetComplete() {
			t.Error("the node is not told everything")
		}
		// Nobody waits for ever for one that does not answer.
		got, errs = r.check("")
		time.Sleep(checkTimeout)
		if one := (<-got).GetNodes()[0]; !one.GetMissing() || <-errs != nil {
			t.Errorf("a silent node: %v", one)
		}
	}, anOverlay("back", "rear"), anOverlay("front", "front"), onNetwork("t1", "n1", "back"))
}

func onNetwork(id, node, network string) *api.Task {
	task := aTask(id, node, api.TaskState_RUNNING)
	task.Networks = []*api.NetworkAttachment{{Network: anOverlay(network, network), Addresses: []string{"10.0.1.2/24"}}}
	return task
}

func TestConvergenceIsMeasured(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, anOverlay("back", "rear"), onNetwork("t1", "n1", "back"))
		registry := prometheus.NewRegistry()
		r.d.metrics = newMetrics(registry)
		r.lead()
		defer r.stop()
		_, id := r.register("n1")
		w := r.watch("n1", id)
		programmed := func(u *skepv1.NetworkUpdate, repaired uint64) {
			t.Helper()
			if _, err := r.d.Networks().Programmed(r.as("n1"), &skepv1.ProgrammedRequest{SessionId: id, Version: u.GetVersion(), Repaired: repaired}); err != nil {
				t.Fatal(err)
			}
		}
		programmed(w.next(), 0)
		r.update(func(tx *store.Tx) error { return tx.Create(onNetwork("t2", "n2", "back")) })
		u := w.latest()
		time.Sleep(300 * time.Millisecond)
		programmed(u, 2)
		families, err := registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		seen := 0
		for _, f := range families {
			switch m := f.GetMetric()[0]; f.GetName() {
			case "skep_dispatcher_network_convergence_seconds":
				seen++
				if h := m.GetHistogram(); h.GetSampleCount() != 1 || h.GetSampleSum() != 0.3 {
					t.Errorf("%d times of %v s together, want one of 0.3 s", h.GetSampleCount(), h.GetSampleSum())
				}
			case "skep_dispatcher_network_repairs_total":
				seen++
				if got := m.GetCounter().GetValue(); got != 2 {
					t.Errorf("%v repairs, want 2", got)
				}
			}
		}
		if seen != 2 {
			t.Error("metrics are missing")
		}
	})
}
