package model

import (
	"net/netip"
	"strings"
	"unicode/utf8"

	"github.com/skep-dev/skep/api"
)

// Constraint is one placement constraint, parsed.
type Constraint struct {
	key    string // the fixed part in lower case; a label's own key as written
	value  string
	negate bool
}

// ParseConstraints reads placement constraints of the form "key == value" or
// "key != value". Invalid, naming the constraint, when one cannot be read. A well
// formed constraint with an unknown key is accepted and matches no node.
func ParseConstraints(list []string) ([]Constraint, error) {
	if len(list) == 0 {
		return nil, nil
	}
	out := make([]Constraint, 0, len(list))
	for _, text := range list {
		c, err := parseConstraint(text)
		if err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	return out, nil
}

const (
	nodeLabels   = "node.labels."
	engineLabels = "engine.labels."
)

func parseConstraint(text string) (Constraint, error) {
	for _, operator := range [...]string{"==", "!="} {
		key, value, found := strings.Cut(text, operator)
		if !found {
			continue
		}
		key, value = strings.TrimSpace(key), strings.TrimSpace(value)
		if !isConstraintKey(key) {
			return Constraint{}, Errorf(Invalid, "key '%s' is invalid", key)
		}
		if !isConstraintValue(value) {
			return Constraint{}, Errorf(Invalid, "value '%s' is invalid", value)
		}
		return Constraint{key: foldKey(key), value: value, negate: operator == "!="}, nil
	}
	return Constraint{}, Errorf(Invalid, "constraint expected one operator from ==, !=")
}

// isConstraintKey holds keys to SwarmKit's pattern, (?i)[a-z_][a-z0-9\-_.]+.
func isConstraintKey(s string) bool {
	for i, r := range s {
		if r != '_' && !isLetter(r) && (i == 0 || !strings.ContainsRune("0123456789-.", r)) {
			return false
		}
	}
	return len(s) > 1 && utf8.RuneCountInString(s) > 1
}

// isConstraintValue holds values to SwarmKit's pattern,
// (?i)[a-z0-9:\-_\s\.\*\(\)\?\+\[\]\\\^\$\|\/]+.
func isConstraintValue(s string) bool {
	for _, r := range s {
		if !isLetter(r) && !strings.ContainsRune("0123456789:-_ \t\n\f\r.*()?+[]\\^$|/", r) {
			return false
		}
	}
	return s != ""
}

// isLetter reports whether r is a letter from a to z in any case; Unicode counts the long
// s and the Kelvin sign among them, and so do those patterns.
func isLetter(r rune) bool {
	return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r == 'ſ' || r == '\u212a'
}

// foldKey lowers what is compared without case: fixed keys and the label prefixes.
func foldKey(key string) string {
	lower := strings.ToLower(key)
	for _, prefix := range [...]string{nodeLabels, engineLabels} {
		if strings.HasPrefix(lower, prefix) {
			return prefix + key[len(prefix):]
		}
	}
	return lower
}

// String returns the constraint in its normal form.
func (c Constraint) String() string {
	if c.negate {
		return c.key + " != " + c.value
	}
	return c.key + " == " + c.value
}

// Match reports whether a node satisfies the constraint.
func (c Constraint) Match(n *api.Node) bool {
	switch c.key {
	case "node.id":
		return c.equals(n.GetId())
	case "node.hostname":
		return c.equals(n.GetDescription().GetHostname())
	case "node.ip":
		return c.matchIP(n.GetStatus().GetAddr())
	case "node.role":
		return c.equals(n.GetRole().String())
	case "node.platform.os":
		return c.equals(n.GetDescription().GetPlatform().GetOs())
	case "node.platform.arch":
		return c.equals(n.GetDescription().GetPlatform().GetArchitecture())
	}
	if label, ok := strings.CutPrefix(c.key, nodeLabels); ok && label != "" {
		return c.equals(n.GetSpec().GetAnnotations().GetLabels()[label])
	}
	if label, ok := strings.CutPrefix(c.key, engineLabels); ok && label != "" {
		return c.equals(n.GetDescription().GetEngine().GetLabels()[label])
	}
	return false
}

func (c Constraint) equals(have string) bool {
	return strings.EqualFold(have, c.value) != c.negate
}

func (c Constraint) matchIP(addr string) bool {
	have, err := netip.ParseAddr(addr)
	if want, ok := parseAddr(c.value); ok {
		return (err == nil && have.Unmap() == want.Unmap()) != c.negate
	}
	if want, ok := parsePrefix(c.value); ok {
		return (err == nil && want.Contains(have.Unmap())) != c.negate
	}
	return false
}

func parseAddr(s string) (netip.Addr, bool) {
	a, err := netip.ParseAddr(s)
	return a, err == nil
}

func parsePrefix(s string) (netip.Prefix, bool) {
	p, err := netip.ParsePrefix(s)
	return p, err == nil
}

// MatchAll reports whether a node satisfies all constraints.
func MatchAll(list []Constraint, n *api.Node) bool {
	for _, c := range list {
		if !c.Match(n) {
			return false
		}
	}
	return true
}
