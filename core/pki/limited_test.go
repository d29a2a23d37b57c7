package pki

import (
	"crypto/rand"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
)

func TestLimited(t *testing.T) {
	root, later := aRoot(t), sampleTime().Add(time.Hour)
	ca := &api.RootCA{CaCert: root.CertPEM}
	token, r, err := NewLimited(rand.Reader, ca, false, WorkerRole, later, 2, map[string]string{"for": "lab"})
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := ParseToken(token)
	if err != nil || parsed.Pins(root.CertPEM) != nil {
		t.Errorf("the docker client cannot use %s: %v", token, err)
	}
	data, err := proto.Marshal(r)
	if err != nil || strings.Contains(string(data), token[len(token)-secretLength:]) {
		t.Errorf("the resource tells the token: %v", err)
	}
	if r.GetAnnotations().GetName() != TokenName(token) || r.GetAnnotations().GetLabels()["for"] != "lab" {
		t.Errorf("the resource is %v", r)
	}
	kept, err := Limited(r)
	if err != nil {
		t.Fatal(err)
	}
	for want, c := range map[string]struct {
		edit func(*skepv1.JoinToken)
		ca   *api.RootCA
		now  time.Time
	}{
		"":                                {func(*skepv1.JoinToken) {}, ca, later.Add(-time.Second)},
		"it expired 2026-11-23T13:00:00Z": {func(*skepv1.JoinToken) {}, ca, later},
		"it has been used up":             {func(k *skepv1.JoinToken) { k.Used = 2 }, ca, sampleTime()},
		"it is of an earlier root":        {func(*skepv1.JoinToken) {}, &api.RootCA{CaCert: aRoot(t).CertPEM}, sampleTime()},
		"it is for no role":               {func(k *skepv1.JoinToken) { k.Role = "swarm-queen" }, ca, sampleTime()},
	} {
		k := proto.CloneOf(kept)
		c.edit(k)
		if got := Void(k, c.ca, c.now); !strings.HasPrefix(got, want) || (want == "") != (got == "") {
			t.Errorf("void because %q, want %q", got, want)
		}
	}
	if _, err := Limited(&api.Resource{Kind: "other"}); err == nil {
		t.Error("a resource of another kind is a token")
	}
}

func FuzzLimited(f *testing.F) {
	payload, err := anypb.New(&skepv1.JoinToken{Role: WorkerRole, Uses: 1})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(payload.GetTypeUrl(), payload.GetValue())
	f.Add("type.googleapis.com/docker.swarmkit.v1.Node", []byte{1})
	f.Fuzz(func(t *testing.T, kind string, value []byte) {
		k, err := Limited(&api.Resource{Kind: TokenKind, Payload: &anypb.Any{TypeUrl: kind, Value: value}})
		if err == nil && Void(k, new(api.RootCA), time.Now()) == "" {
			t.Error("a token without a root admits somebody")
		}
	})
}

func FuzzReturning(f *testing.F) {
	root, err := NewRoot(rand.Reader, sampleTime())
	if err != nil {
		f.Fatal(err)
	}
	signature, err := SignReturn(rand.Reader, root.Key, []byte("request"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(root.CertPEM, []byte("request"), signature)
	f.Fuzz(func(t *testing.T, chain, csr, signature []byte) {
		cert, err := Returning(chain, csr, signature)
		if (err == nil) != (cert != nil) {
			t.Errorf("certificate %v and error %v", cert, err)
		}
	})
}
