package dockerapi

import (
	"context"
	"net/http"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/platform/audit"
)

type objectKey struct{}

// setObject names what a request is about, for the audit log, where its path does not.
func setObject(r *http.Request, name string) {
	if object, ok := r.Context().Value(objectKey{}).(*string); ok {
		*object = name
	}
}

// objectOf returns what the path or the query of a request names.
func objectOf(r *http.Request) string {
	for _, key := range []string{"id", "name"} {
		if v := r.PathValue(key); v != "" {
			return v
		}
	}
	query := r.URL.Query()
	for _, key := range []string{"name", "fromImage", "target"} {
		if v := query.Get(key); v != "" {
			return v
		}
	}
	return ""
}

// gate holds every request to the table of grants, and records it where that says so. It
// implements httpapi.Gate.
func (a *API) gate(r *http.Request, method, pattern string) (*http.Request, func(int), error) {
	route := method + " " + pattern
	grant := a.grants.of(route)
	caller := a.identify(r)
	object := objectOf(r)
	ctx := context.WithValue(context.WithValue(r.Context(), callerKey{}, caller), objectKey{}, &object)
	r = r.WithContext(ctx)
	record := audit.Record{Who: caller.Who, Role: caller.Role.String(), From: caller.From, What: route, Object: object}
	if caller.Role < grant.role {
		record.Outcome, record.Status, record.Reason = audit.Refused, http.StatusForbidden, "needs the role "+grant.role.String()
		a.record(record)
		return r, nil, model.Errorf(model.Denied, "permission denied: %s has the role %s, and %s needs the role %s", caller.Who, caller.Role, route, grant.role)
	}
	if grant.long {
		begun := record
		begun.Outcome = audit.Begun
		a.record(begun)
	}
	return r, func(status int) {
		record.Status, record.Outcome, record.Object = status, outcomeOf(status), object
		if grant.recorded || record.Outcome == audit.Refused {
			a.record(record)
		}
	}, nil
}

func outcomeOf(status int) string {
	switch {
	case status == http.StatusForbidden || status == http.StatusUnauthorized:
		return audit.Refused
	case status >= http.StatusBadRequest:
		return audit.Failed
	default:
		return audit.Done
	}
}

func (a *API) record(r audit.Record) {
	if a.config.Audit != nil {
		a.config.Audit.Add(r)
	}
}
