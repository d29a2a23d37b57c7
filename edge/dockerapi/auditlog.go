package dockerapi

import (
	"net/http"
	"strconv"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/edge/dockerapi/httpapi"
	"github.com/skep-dev/skep/platform/audit"
)

// maxAuditTail bounds the records of one answer.
const maxAuditTail = 10000

// routeAudit adds how the audit log of this daemon is read.
func (a *API) routeAudit() {
	a.router.Handle("GET", "/skep/v1/audit", func(w http.ResponseWriter, r *http.Request) error {
		if a.config.Audit == nil {
			return model.Errorf(model.Unimplemented, "this daemon keeps no audit log")
		}
		n := 100
		if text := r.URL.Query().Get("tail"); text != "" {
			var err error
			if n, err = strconv.Atoi(text); err != nil || n < 1 || n > maxAuditTail {
				return model.Errorf(model.Invalid, "tail %q is not a number from 1 to %d", text, maxAuditTail)
			}
		}
		records, err := audit.Read(a.config.Audit.Dir(), n)
		if err != nil {
			return err
		}
		if records == nil {
			records = []audit.Record{}
		}
		return httpapi.WriteJSON(w, http.StatusOK, records)
	})
}
