package plugin

import (
	"encoding/json"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

// serve is a plugin on a socket that answers with what the test says.
func serve(t *testing.T, path string, answers map[string]string) *[]map[string]any {
	t.Helper()
	var lc net.ListenConfig
	listen, err := lc.Listen(t.Context(), "unix", path)
	if err != nil {
		t.Fatal(err)
	}
	var asked []map[string]any
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var body map[string]any
		if err := json.NewDecoder(r.Body).Decode(&body); err != nil || r.Method != http.MethodPost {
			t.Errorf("%s %s: %v", r.Method, r.URL, err)
		}
		asked = append(asked, body)
		answer, ok := answers[r.URL.Path]
		if !ok {
			w.WriteHeader(http.StatusInternalServerError)
			answer = `{"Err": "no such method"}`
		}
		_, _ = w.Write([]byte(answer))
	})}
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(listen) }()
	t.Cleanup(func() { _ = server.Close(); <-done })
	return &asked
}

// finder looks in short directories: a socket's path is bounded.
func finder(t *testing.T) Finder {
	t.Helper()
	dir, err := os.MkdirTemp("", "plug") //nolint:usetesting // t.TempDir is too long for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return Finder{SocketDir: dir, SpecDirs: []string{dir + "/etc"}}
}

func TestFind(t *testing.T) {
	f := finder(t)
	for _, dir := range []string{"nested", "etc"} {
		if err := os.Mkdir(filepath.Join(f.SocketDir, dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	serve(t, f.SocketDir+"/plain.sock", nil)
	serve(t, f.SocketDir+"/nested/nested.sock", nil)
	for name, text := range map[string]string{"listed": "unix:///run/listed.sock\n", "far": "tcp://127.0.0.1:1", "relative": "unix://x"} {
		if err := os.WriteFile(filepath.Join(f.SocketDir, "etc", name+".spec"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, want := range map[string]string{
		"plain": f.SocketDir + "/plain.sock", "nested": f.SocketDir + "/nested/nested.sock", "listed": "/run/listed.sock",
	} {
		if got, err := f.Find(name); err != nil || got != want {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	for name, kind := range map[string]model.Kind{
		"absent": model.NotFound, "far": model.Unimplemented, "relative": model.Unimplemented, "../plain": model.Invalid, "": model.Invalid,
	} {
		if _, err := f.Find(name); model.KindOf(err) != kind {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestSecretDriver(t *testing.T) {
	f := finder(t)
	asked := serve(t, f.SocketDir+"/vault.sock", map[string]string{
		"/Plugin.Activate": `{"Implements": ["secretprovider"]}`, "/SecretProvider.GetSecret": `{"Value": "aHVudGVyMg==", "DoNotReuse": true}`,
	})
	if err := f.CheckSecretDriver(t.Context(), "vault"); err != nil {
		t.Error(err)
	}
	secret := &api.Secret{Id: "s", Spec: &api.SecretSpec{Annotations: &api.Annotations{Name: "db", Labels: map[string]string{"a": "b"}}, Driver: &api.Driver{Name: "vault"}}}
	task := &api.Task{
		Id: "t", Slot: 1, NodeId: "n", ServiceId: "svc", ServiceAnnotations: &api.Annotations{Name: "web"},
		Spec:     &api.TaskSpec{Runtime: &api.TaskSpec_Container{Container: &api.ContainerSpec{Image: "img", Hostname: "h"}}},
		Endpoint: &api.Endpoint{Spec: &api.EndpointSpec{Ports: []*api.PortConfig{{Name: "p", TargetPort: 80, PublishedPort: 8080}}}},
	}
	data, reuse, err := f.Secret(t.Context(), secret, task)
	if err != nil || string(data) != "hunter2" || reuse {
		t.Errorf("%q, %v, %v", data, reuse, err)
	}
	last := (*asked)[len(*asked)-1]
	for key, want := range map[string]string{
		"SecretName": "db", "ServiceName": "web", "ServiceID": "svc", "TaskID": "t", "TaskName": "web.1.t", "TaskImage": "img", "NodeID": "n", "ServiceHostname": "h",
	} {
		if last[key] != want {
			t.Errorf("the driver hears %s %v, want %s", key, last[key], want)
		}
	}
	if ports, err := json.Marshal(last["ServiceEndpointSpec"]); err != nil || string(ports) != `{"Ports":[{"Name":"p","PublishedPort":8080,"TargetPort":80}]}` {
		t.Errorf("the driver hears %s, %v", ports, err)
	}
}

func TestFaultyDrivers(t *testing.T) {
	f := finder(t)
	secret := func(driver string) *api.Secret {
		return &api.Secret{Spec: &api.SecretSpec{Annotations: &api.Annotations{Name: "db"}, Driver: &api.Driver{Name: driver}}}
	}
	for name, c := range map[string]struct{ answer, want string }{
		"says-no": {`{"Err": "sealed"}`, "secret driver says-no: sealed"},
		"empty":   {`{}`, "gave 0 bytes"},
		"garbage": {`hunter2`, "not the JSON"},
		"large":   {`{"Value": "` + strings.Repeat("A", 800_000) + `"}`, "gave 600000 bytes"},
		"endless": {strings.Repeat(" ", maxAnswer+1), "more than"},
	} {
		serve(t, f.SocketDir+"/"+name+".sock", map[string]string{"/SecretProvider.GetSecret": c.answer, "/Plugin.Activate": `{"Implements": ["VolumeDriver"]}`})
		_, _, err := f.Secret(t.Context(), secret(name), new(api.Task))
		if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := f.CheckSecretDriver(t.Context(), "empty"); err == nil || !strings.Contains(err.Error(), "does not implement secretprovider, but VolumeDriver") {
		t.Errorf("another kind of plugin: %v", err)
	}
	if err := f.CheckSecretDriver(t.Context(), "absent"); model.KindOf(err) != model.NotFound {
		t.Errorf("an absent plugin: %v", err)
	}
	serve(t, f.SocketDir+"/mute.sock", nil)
	if err := f.CheckSecretDriver(t.Context(), "mute"); err == nil || !strings.Contains(err.Error(), "no such method") {
		t.Errorf("a plugin that fails: %v", err)
	}
}
