package dockerapi

import (
	"context"
	"crypto/x509"
	"net/http"
	"slices"
	"strings"

	"github.com/skep-dev/skep/core/model"
)

// Role is what a caller of the API may do. A greater role may do all that a smaller one may.
type Role int

// The roles, from nothing to everything.
const (
	NoRole Role = iota
	// Viewer reads, but no keys, tokens, and nothing out of containers.
	Viewer
	// Operator changes services, networks, secrets and configs of the swarm.
	Operator
	// Admin does everything, which makes it root on every node.
	Admin
)

// String returns the role's name.
func (r Role) String() string {
	switch r {
	case NoRole:
		return "none"
	case Viewer:
		return "viewer"
	case Operator:
		return "operator"
	case Admin:
		return "admin"
	}
	return "unknown"
}

func parseRole(name string) (Role, bool) {
	for r := NoRole; r <= Admin; r++ {
		if r.String() == name {
			return r, true
		}
	}
	return NoRole, false
}

// Caller is who makes a request.
type Caller struct {
	// Who names the caller, From its address.
	Who, From string
	Role      Role
}

// RoleRules give roles to client certificates. The zero value knows only the organizational
// units skep-admin, skep-operator and skep-viewer.
type RoleRules struct {
	rules []roleRule
}

type roleRule struct {
	field, name string // "cn" or "ou"; "*" is everybody whom no other rule knows
	role        Role
}

// ParseRoleRules reads rules of the form cn=NAME:ROLE, ou=NAME:ROLE or *:ROLE.
func ParseRoleRules(texts []string) (RoleRules, error) {
	var out RoleRules
	for _, text := range texts {
		i := strings.LastIndexByte(text, ':')
		if i < 0 {
			return RoleRules{}, badRule(text)
		}
		role, known := parseRole(text[i+1:])
		rule := roleRule{field: text[:i], role: role}
		if rule.field != "*" {
			var ok bool
			rule.field, rule.name, ok = strings.Cut(text[:i], "=")
			if rule.field = strings.ToLower(rule.field); !ok || rule.name == "" || rule.field != "cn" && rule.field != "ou" {
				return RoleRules{}, badRule(text)
			}
		}
		if !known {
			return RoleRules{}, badRule(text)
		}
		out.rules = append(out.rules, rule)
	}
	return out, nil
}

func badRule(text string) error {
	return model.Errorf(model.Invalid, "rule %q is none of cn=NAME:ROLE, ou=NAME:ROLE and *:ROLE, with ROLE one of none, viewer, operator, admin", text)
}

// RoleOf returns the role of a verified client certificate: the greatest that its units and
// the rules for its names give; else that of the rule for everybody; else none, unless there
// are no rules at all: then whoever has a certificate is admin, as with Docker.
func (r RoleRules) RoleOf(cert *x509.Certificate) Role {
	var found []Role
	everybody := NoRole
	if len(r.rules) == 0 {
		everybody = Admin
	}
	for _, ou := range cert.Subject.OrganizationalUnit {
		if name, ok := strings.CutPrefix(ou, "skep-"); ok {
			if role, known := parseRole(name); known {
				found = append(found, role)
			}
		}
	}
	for _, rule := range r.rules {
		switch {
		case rule.field == "*":
			everybody = rule.role
		case rule.field == "cn" && cert.Subject.CommonName == rule.name,
			rule.field == "ou" && slices.Contains(cert.Subject.OrganizationalUnit, rule.name):
			found = append(found, rule.role)
		}
	}
	if len(found) > 0 {
		return slices.Max(found)
	}
	return everybody
}

type peerKey struct{}

// WithPeer notes who is at the other end of a local socket, for the requests of its
// connection.
func WithPeer(ctx context.Context, who string) context.Context {
	return context.WithValue(ctx, peerKey{}, who)
}

// identify returns the caller of a request. Who reaches a socket of the machine, or a host
// that was opened to everybody, is admin.
func (a *API) identify(r *http.Request) Caller {
	if who, ok := r.Context().Value(peerKey{}).(string); ok {
		return Caller{Who: who, From: "local", Role: Admin}
	}
	c := Caller{Who: "anonymous", From: r.RemoteAddr, Role: Admin}
	if r.TLS != nil && len(r.TLS.VerifiedChains) > 0 {
		cert := r.TLS.PeerCertificates[0]
		c.Who, c.Role = "cn="+cert.Subject.CommonName, a.config.Roles.RoleOf(cert)
		for _, ou := range cert.Subject.OrganizationalUnit {
			c.Who += " ou=" + ou
		}
	}
	return c
}

type callerKey struct{}

// callerOf returns the caller of an admitted request.
func callerOf(ctx context.Context) Caller {
	c, _ := ctx.Value(callerKey{}).(Caller)
	return c
}
