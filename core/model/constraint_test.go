package model

import (
	"regexp"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/skep-dev/skep/api"
)

func constraintNode() *api.Node {
	return &api.Node{
		Id:   "Node1",
		Role: api.NodeRole_MANAGER,
		Spec: &api.NodeSpec{
			Annotations: &api.Annotations{Labels: map[string]string{"zone": "East", "Zone": "other", "empty": ""}},
			DesiredRole: api.NodeRole_WORKER,
		},
		Status: &api.NodeStatus{Addr: "10.1.2.3"},
		Description: &api.NodeDescription{
			Hostname: "Alpha",
			Platform: &api.Platform{Os: "linux", Architecture: "x86_64"},
			Engine:   &api.EngineDescription{Labels: map[string]string{"storage.kind": "ssd"}},
		},
	}
}

// TestConstraintMatch has every key with both operators.
func TestConstraintMatch(t *testing.T) {
	bare := &api.Node{Id: "bare"}
	for _, c := range []struct {
		text       string
		full, bare bool // whether the described and the bare node match
	}{
		{"node.id == Node1", true, false},
		{"node.id==nODE1", true, false},
		{"node.id != Node1", false, true},
		{"node.id == Node", false, false},
		{"NODE.ID == node1", true, false},
		{"node.hostname == alpha", true, false},
		{"node.hostname != alpha", false, true},
		{"node.hostname == alph*", false, false},
		{"node.role == manager", true, false},
		{"node.role != manager", false, true},
		{"node.role == WORKER", false, true},
		{"node.role != worker", true, false},
		{"node.ip == 10.1.2.3", true, false},
		{"node.ip != 10.1.2.3", false, true},
		{"node.ip == 10.1.2.4", false, false},
		{"node.ip == 10.1.0.0/16", true, false},
		{"node.ip == 10.1.2.99/24", true, false},
		{"node.ip != 10.1.0.0/16", false, true},
		{"node.ip == 10.2.0.0/16", false, false},
		{"node.ip == somewhere", false, false},
		{"node.ip != somewhere", false, false},
		{"node.platform.os == Linux", true, false},
		{"node.platform.os != linux", false, true},
		{"node.platform.arch == x86_64", true, false},
		{"node.platform.arch == amd64", false, false},
		{"node.platform.arch != amd64", true, true},
		{"node.labels.zone == east", true, false},
		{"node.labels.zone != east", false, true},
		{"node.labels.Zone == other", true, false},
		{"Node.Labels.zone == EAST", true, false},
		{"node.labels.ZONE == east", false, false},
		{"node.labels.missing != anything", true, true},
		{"node.labels.missing == anything", false, false},
		{"node.labels. != anything", false, false},
		{"engine.labels.storage.kind == SSD", true, false},
		{"engine.labels.storage.kind != ssd", false, true},
		{"Engine.labels.storage.kind == ssd", true, false},
		{"engine.labels.Storage.kind == ssd", false, false},
		{"engine.labels. != anything", false, false},
		{"node.colour == red", false, false},
		{"node.colour != red", false, false},
		{"service.id != red", false, false},
	} {
		list, err := ParseConstraints([]string{c.text})
		if err != nil {
			t.Errorf("%s: %v", c.text, err)
			continue
		}
		if got := MatchAll(list, constraintNode()); got != c.full {
			t.Errorf("%s: matches the described node: %v, want %v", c.text, got, c.full)
		}
		if got := MatchAll(list, bare); got != c.bare {
			t.Errorf("%s: matches the bare node: %v, want %v", c.text, got, c.bare)
		}
	}
}

// TestConstraintAddresses has the other family and addresses in disguise.
func TestConstraintAddresses(t *testing.T) {
	for _, c := range []struct {
		addr, text string
		want       bool
	}{
		{"fd00::1", "node.ip == fd00::1", true},
		{"fd00::1", "node.ip == fd00:0:0::1", true},
		{"fd00::1", "node.ip == fd00::/8", true},
		{"fd00::1", "node.ip != fd00::/8", false},
		{"fd00::1", "node.ip == 10.0.0.0/8", false},
		{"::ffff:10.0.0.1", "node.ip == 10.0.0.1", true},
		{"::ffff:10.0.0.1", "node.ip == 10.0.0.0/8", true},
		{"10.0.0.1", "node.ip == ::ffff:10.0.0.1", true},
		{"unknown", "node.ip == 10.0.0.1", false},
		{"unknown", "node.ip != 10.0.0.1", true},
	} {
		list, err := ParseConstraints([]string{c.text})
		if err != nil {
			t.Fatal(err)
		}
		if got := MatchAll(list, &api.Node{Status: &api.NodeStatus{Addr: c.addr}}); got != c.want {
			t.Errorf("%s on %s: %v, want %v", c.text, c.addr, got, c.want)
		}
	}
}

func TestMatchAllWantsAll(t *testing.T) {
	list, err := ParseConstraints([]string{"node.id == node1", "node.role == worker"})
	if err != nil {
		t.Fatal(err)
	}
	if MatchAll(list, constraintNode()) {
		t.Error("one constraint of two holds, and that is enough")
	}
	if !MatchAll(list[:1], constraintNode()) || !MatchAll(nil, constraintNode()) {
		t.Error("the first one holds, and none does as well")
	}
}

// TestParseConstraintErrors has the texts that users of Docker know.
func TestParseConstraintErrors(t *testing.T) {
	for text, want := range map[string]string{
		"":                      "constraint expected one operator from ==, !=",
		"node.id = x":           "constraint expected one operator from ==, !=",
		"node.id > x":           "constraint expected one operator from ==, !=",
		"a b == x":              "key 'a b' is invalid",
		"== x":                  "key '' is invalid",
		"a == x":                "key 'a' is invalid", // two characters at least
		"1a == x":               "key '1a' is invalid",
		"node.id ==":            "value '' is invalid",
		"node.id == a!=b":       "value 'a!=b' is invalid",
		"node.id != a==b":       "key 'node.id != a' is invalid", // == is looked for first
		"node.id == a,b":        "value 'a,b' is invalid",
		"node.id == {a}":        "value '{a}' is invalid",
		"node.labels.ä == x":    "key 'node.labels.ä' is invalid",
		"node.labels.a == \x00": "value '\x00' is invalid",
	} {
		_, err := ParseConstraints([]string{"node.id == fine", text})
		if err == nil || err.Error() != want || KindOf(err) != Invalid {
			t.Errorf("%q: %v, want %s", text, err, want)
		}
	}
	if list, err := ParseConstraints([]string{}); list != nil || err != nil {
		t.Errorf("no constraints: %v, %v", list, err)
	}
}

// TestConstraintPatterns holds the readers to SwarmKit's regular expressions.
func TestConstraintPatterns(t *testing.T) {
	key := regexp.MustCompile(`^(?i)[a-z_][a-z0-9\-_.]+$`)
	value := regexp.MustCompile(`^(?i)[a-z0-9:\-_\s\.\*\(\)\?\+\[\]\\\^\$\|\/]+$`)
	for r := range rune(0x2200) {
		for _, s := range []string{string(r), string(r) + "a", "a" + string(r), string(r) + string(r)} {
			if got, want := isConstraintKey(s), key.MatchString(s); got != want {
				t.Errorf("key %q: %v, want %v", s, got, want)
			}
			if got, want := isConstraintValue(s), value.MatchString(s); got != want {
				t.Errorf("value %q: %v, want %v", s, got, want)
			}
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		s := rapid.StringOf(rapid.SampledFrom([]rune("aZ_-.09:* \t\n/\\^$|?+()[]=!,äſ\u212a\xff"))).Draw(t, "s")
		if isConstraintKey(s) != key.MatchString(s) || isConstraintValue(s) != value.MatchString(s) {
			t.Fatalf("%q: key %v, value %v", s, isConstraintKey(s), isConstraintValue(s))
		}
	})
}

// FuzzParseConstraints reads anything; what it accepts it writes and reads again the same.
func FuzzParseConstraints(f *testing.F) {
	for _, seed := range []string{"node.id == x", "Node.Labels.Key!=Value", "engine.labels.a.b==c d", "node.ip == 10.0.0.0/8", "a==b!=c", "node.labels. == x", "=="} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		list, err := ParseConstraints([]string{text})
		if err != nil {
			if KindOf(err) != Invalid || !strings.Contains(err.Error(), "invalid") && !strings.Contains(err.Error(), "expected one operator") {
				t.Errorf("%q: %v", text, err)
			}
			return
		}
		again, err := ParseConstraints([]string{list[0].String()})
		if err != nil || again[0] != list[0] {
			t.Errorf("%q reads as %+v, written %q reads as %+v, %v", text, list[0], list[0], again, err)
		}
		n := constraintNode()
		if opposite := (Constraint{key: list[0].key, value: list[0].value, negate: !list[0].negate}); list[0].Match(n) && opposite.Match(n) {
			t.Errorf("%q and its opposite both hold", text)
		}
	})
}
