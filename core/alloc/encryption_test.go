package alloc

import (
	"fmt"
	"testing"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

func encryptedSpec(name string, options ...string) *api.NetworkSpec {
	o := map[string]string{model.EncryptedOption: ""}
	for i := 0; i < len(options); i += 2 {
		o[options[i]] = options[i+1]
	}
	return &api.NetworkSpec{Annotations: &api.Annotations{Name: name}, DriverConfig: &api.Driver{Name: "overlay", Options: o}}
}

func TestEncryptionIsWhatAllNodesCan(t *testing.T) {
	w := newWorld(t.Fatalf, "10.0.0.0/8", 24)
	node := func(id, can string, state api.NodeStatus_State) {
		w.store(&api.Node{Id: id, Status: &api.NodeStatus{State: state}, Description: &api.NodeDescription{
			Engine: &api.EngineDescription{
				Labels: map[string]string{model.EncryptionLabel: can}, Plugins: []*api.PluginDescription{{Type: "Network", Name: model.SkepOverlay}},
			},
		}})
	}
	count := 0
	want := func(how string, port uint16, options ...string) {
		t.Helper()
		count++
		n, err := w.network(encryptedSpec(fmt.Sprintf("net%d", count), options...))
		if err != nil {
			t.Fatal(err)
		}
		if gotHow, gotPort := model.Encryption(n); gotHow != how || gotPort != port {
			t.Errorf("network %d: %s on port %d, want %s on %d", count, gotHow, gotPort, how, port)
		}
	}
	want(model.WireGuard, 21820) // no node has said anything
	node("n1", "esp,wireguard", api.NodeStatus_READY)
	want(model.ESP, model.ESPPort)
	want(model.ESP, model.ESPPort)
	want(model.WireGuard, 21821, model.EncryptionOption, model.WireGuard)
	node("n2", "wireguard-userspace", api.NodeStatus_READY)
	want(model.WireGuard, 21822)
	want(model.ESP, model.ESPPort, model.EncryptionOption, model.ESP)
	want(model.WireGuard, 6000, model.EncryptionPortOption, "6000")
	node("n2", "wireguard-userspace", api.NodeStatus_DOWN)
	want(model.ESP, model.ESPPort)
	// What a Docker Engine can do does not matter: it gets no task of such a network.
	w.store(dockerNode("n3"))
	want(model.ESP, model.ESPPort)

	_, err := w.network(encryptedSpec("twice", model.EncryptionOption, model.WireGuard, model.EncryptionPortOption, "6000"))
	wantBlocked(t, err, AnyNetwork, "UDP port 6000", "net7", model.EncryptionPortOption)
	plain, err := w.network(&api.NetworkSpec{Annotations: &api.Annotations{Name: "clear"}})
	if how, port := model.Encryption(plain); err != nil || how != "" || port != 0 {
		t.Errorf("a network in clear: %s on %d, %v", how, port, err)
	}
}
