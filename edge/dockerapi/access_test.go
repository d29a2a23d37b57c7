package dockerapi

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/edge/dockerapi/local"
	"github.com/skep-dev/skep/platform/audit"
)

// TestEveryRouteHasARole holds the table of grants against the router: no route without a
// role, no role without a route.
func TestEveryRouteHasARole(t *testing.T) {
	a := New(Config{Daemon: factsOnly{}, Log: slog.New(slog.DiscardHandler)})
	a.Register(local.New(local.Config{}).Register)
	a.Handler()
	left := newGrants()
	for _, route := range a.router.Routes() {
		g, ok := left[route]
		if !ok {
			t.Errorf("%s has no role in grants.go", route)
		}
		if reads := strings.HasPrefix(route, "GET ") || strings.HasPrefix(route, "HEAD "); !reads && !g.recorded && g.role > Viewer && !strings.HasSuffix(route, "/resize") {
			t.Errorf("%s changes something and is not recorded", route)
		}
		delete(left, route)
	}
	for route := range left {
		t.Errorf("%s has a role and is no route", route)
	}
	if g := newGrants().of("GET /new"); g.role != Admin || !g.recorded {
		t.Errorf("a route without a role is open to %s", g.role)
	}
}

func certOf(cn string, ous ...string) *x509.Certificate {
	return &x509.Certificate{Subject: pkix.Name{CommonName: cn, OrganizationalUnit: ous}}
}

func TestRoleRules(t *testing.T) {
	for _, c := range []struct {
		rules []string
		cert  *x509.Certificate
		want  Role
	}{
		{nil, certOf("alice"), Admin}, // as with Docker, until somebody says otherwise
		{nil, certOf("alice", "sales"), Admin},
		{nil, certOf("alice", "skep-viewer"), Viewer},
		{nil, certOf("alice", "skep-none"), NoRole},
		{nil, certOf("alice", "skep-viewer", "skep-operator"), Operator},
		{nil, certOf("alice", "skep-unheard-of"), Admin},
		{[]string{"cn=bob:admin"}, certOf("alice"), NoRole},
		{[]string{"cn=bob:admin"}, certOf("bob"), Admin},
		{[]string{"CN=bob:admin"}, certOf("bob"), Admin},
		{[]string{"cn=bob:admin"}, certOf("x", "bob"), NoRole},
		{[]string{"ou=dev:operator", "*:viewer"}, certOf("alice", "dev"), Operator},
		{[]string{"ou=dev:operator", "*:viewer"}, certOf("alice"), Viewer},
		{[]string{"cn=a:b:viewer"}, certOf("a:b"), Viewer},
		{[]string{"cn=bob:viewer"}, certOf("bob", "skep-admin"), Admin},
		{[]string{"*:none"}, certOf("bob"), NoRole},
	} {
		rules, err := ParseRoleRules(c.rules)
		if err != nil {
			t.Fatal(err)
		}
		if got := rules.RoleOf(c.cert); got != c.want {
			t.Errorf("%v: %v is %s, want %s", c.rules, c.cert.Subject, got, c.want)
		}
	}
	for _, bad := range []string{"", "bob", "cn=bob", "cn=:admin", "cn=bob:root", "sn=bob:admin", "bob:admin", ":admin", "*"} {
		if _, err := ParseRoleRules([]string{bad}); model.KindOf(err) != model.Invalid {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func FuzzParseRoleRules(f *testing.F) {
	for _, seed := range []string{"cn=a:admin", "*:none", "ou=b:viewer", ":", "=:", ""} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		rules, err := ParseRoleRules([]string{text})
		if err == nil && !strings.HasPrefix(text, "*:") && rules.RoleOf(certOf("nobody at all")) != NoRole && !strings.Contains(text, "nobody at all") {
			t.Errorf("%q gives a role to everybody", text)
		}
	})
}

// TestGate calls every route with every role, and by a local socket.
func TestGate(t *testing.T) {
	log, err := audit.Open(audit.Config{Dir: t.TempDir(), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- log.Run(ctx) }()
	a := New(Config{Daemon: factsOnly{}, Log: slog.New(slog.DiscardHandler), Audit: log})
	refused := 0
	for route, g := range newGrants() {
		method, pattern, _ := strings.Cut(route, " ")
		for role := NoRole; role <= Admin; role++ {
			r := httptest.NewRequest(method, "https://x/x", nil)
			r.TLS = &tls.ConnectionState{PeerCertificates: []*x509.Certificate{certOf("c", "skep-"+role.String())}}
			r.TLS.VerifiedChains = [][]*x509.Certificate{r.TLS.PeerCertificates}
			_, _, err := a.gate(r, method, pattern)
			if want := role >= g.role; (err == nil) != want || err != nil && model.KindOf(err) != model.Denied {
				t.Errorf("%s calls %s: %v", role, route, err)
			}
			if err != nil {
				refused++
			}
		}
		r := httptest.NewRequest(method, "http://x/x", nil)
		if _, _, err := a.gate(r.WithContext(WithPeer(r.Context(), "uid=0")), method, pattern); err != nil {
			t.Errorf("root calls %s: %v", route, err)
		}
	}
	r := httptest.NewRequest(http.MethodPost, "https://x/x", nil)
	r.SetPathValue("id", "thing")
	_, leave, err := a.gate(r.WithContext(WithPeer(r.Context(), "uid=0")), "POST", "/services/{id}/update")
	if err != nil {
		t.Fatal(err)
	}
	leave(409)
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	report, err := audit.Verify(log.Dir(), nil)
	if err != nil || report.Records+int(report.Skipped) < refused {
		t.Errorf("%d refusals, the log has %+v, %v", refused, report, err)
	}
	last, err := audit.Read(log.Dir(), 1)
	if err != nil || len(last) != 1 {
		t.Fatal(last, err)
	}
	got := last[0]
	if got.Who != "uid=0" || got.Role != "admin" || got.What != "POST /services/{id}/update" || got.Object != "thing" || got.Outcome != audit.Failed || got.Status != 409 {
		t.Errorf("%+v", got)
	}
}

func TestReach(t *testing.T) {
	spec := func(edit func(*api.ContainerSpec)) *api.ServiceSpec {
		c := &api.ContainerSpec{Image: "i"}
		edit(c)
		return &api.ServiceSpec{Task: &api.TaskSpec{Runtime: &api.TaskSpec_Container{Container: c}}}
	}
	onHost := spec(func(*api.ContainerSpec) {})
	onHost.Task.Networks = []*api.NetworkAttachmentConfig{{Target: "hostid"}}
	for want, s := range map[string]*api.ServiceSpec{
		"": spec(func(c *api.ContainerSpec) {
			c.CapabilityDrop = []string{"ALL"}
			c.Privileges = &api.Privileges{NoNewPrivileges: true}
			c.Mounts = []*api.Mount{{Type: api.Mount_VOLUME, Source: "v"}, {Type: api.Mount_TMPFS}}
		}),
		"the bind mount of /":        spec(func(c *api.ContainerSpec) { c.Mounts = []*api.Mount{{Type: api.Mount_BIND, Source: "/"}} }),
		"the added capabilities ALL": spec(func(c *api.ContainerSpec) { c.CapabilityAdd = []string{"ALL"} }),
		"changed privileges":         spec(func(c *api.ContainerSpec) { c.Privileges = &api.Privileges{Apparmor: new(api.Privileges_AppArmorOpts)} }),
		"the network of the host":    onHost,
		"the volume driver options of /x": spec(func(c *api.ContainerSpec) {
			c.Mounts = []*api.Mount{{Type: api.Mount_VOLUME, Target: "/x", VolumeOptions: &api.Mount_VolumeOptions{DriverConfig: &api.Driver{Options: map[string]string{"device": "/"}}}}}
		}),
		"a runtime that is not containers": {Task: &api.TaskSpec{Runtime: &api.TaskSpec_Generic{Generic: new(api.GenericRuntimeSpec)}}},
	} {
		if got := strings.Join(reach(s, "hostid"), "; "); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	old := spec(func(c *api.ContainerSpec) { c.CapabilityAdd = []string{"ALL"} })
	old.Mode = &api.ServiceSpec_Replicated{Replicated: &api.ReplicatedService{Replicas: 1}}
	scaled := model.Clone(old)
	scaled.GetReplicated().Replicas = 9
	scaled.Task.ForceUpdate++
	if !onlyScaled(old, scaled) {
		t.Error("scaling changes more")
	}
	scaled.GetTask().GetContainer().Image = "other"
	if onlyScaled(old, scaled) {
		t.Error("another image changes nothing")
	}
}
