package dockerapi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"filippo.io/age"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/edge/dockerapi/httpapi"
)

// maxBackup bounds what a restore reads, in bytes.
const maxBackup = 4 << 30

// Backups copies swarms, as the endpoints below /skep/v1 offer it.
type Backups interface {
	// Backup returns the whole state of the swarm, in the clear: everything that was
	// acknowledged before the call, or with stale what this manager has.
	Backup(ctx context.Context, stale bool) ([]byte, error)
	// Restore makes this node, which must be in no swarm, the only manager of a swarm that
	// goes on from a backup.
	Restore(ctx context.Context, data []byte, req RestoreRequest) (Restored, error)
}

// RestoreRequest says how a swarm goes on. Addresses are as those of swarm init, and empty
// means the same.
type RestoreRequest struct {
	ListenAddr, AdvertiseAddr, DataPathAddr string
	// Alone removes the workers as well: the new swarm begins without nodes.
	Alone bool
}

// Restored says what became of a backup.
type Restored struct {
	NodeID    string    `json:"node_id"`
	ClusterID string    `json:"cluster_id"`
	CreatedAt time.Time `json:"created_at"`
	// What is not in the restored swarm.
	RemovedManagers int `json:"removed_managers"`
	RemovedWorkers  int `json:"removed_workers"`
	OrphanedTasks   int `json:"orphaned_tasks"`
	// Locked says that the swarm locks its managers.
	Locked bool `json:"locked"`
}

func (a *API) routeBackups() {
	a.router.Handle("POST", "/skep/v1/backup", a.createBackup)
	a.router.Handle("POST", "/skep/v1/restore", a.restoreBackup)
}

func errNoBackups() error {
	return model.Errorf(model.Unimplemented, "this daemon keeps no swarm, so there are no backups")
}

// createBackup answers with a backup that only the owners of the recipients' private keys
// can read: in the clear it leaves this process nowhere.
func (a *API) createBackup(w http.ResponseWriter, r *http.Request) error {
	if a.config.Backups == nil {
		return errNoBackups()
	}
	query := r.URL.Query()
	recipients := make([]age.Recipient, 0, len(query["recipient"]))
	for _, text := range query["recipient"] {
		recipient, err := age.ParseX25519Recipient(text)
		if err != nil {
			return model.Errorf(model.Invalid, "recipient %q is not the public key of an age identity, age1…", text)
		}
		recipients = append(recipients, recipient)
	}
	if len(recipients) == 0 {
		return model.Errorf(model.Invalid, "a backup holds every secret of the swarm: name at least one recipient to encrypt it to")
	}
	data, err := a.config.Backups.Backup(r.Context(), httpapi.Bool(r, "stale"))
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	sealed, err := age.Encrypt(w, recipients...)
	if err != nil {
		return err
	}
	// What is cut short cannot be opened: each chunk and the end are authenticated.
	if _, err := sealed.Write(data); err != nil {
		return err
	}
	return sealed.Close()
}

func (a *API) restoreBackup(w http.ResponseWriter, r *http.Request) error {
	if a.config.Backups == nil {
		return errNoBackups()
	}
	data, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBackup))
	if err != nil {
		if _, large := errors.AsType[*http.MaxBytesError](err); large {
			return httpapi.Errorf(http.StatusRequestEntityTooLarge, "the backup is larger than %d bytes", maxBackup)
		}
		return fmt.Errorf("read backup: %w", err)
	}
	query := r.URL.Query()
	restored, err := a.config.Backups.Restore(r.Context(), data, RestoreRequest{
		ListenAddr: query.Get("listen"), AdvertiseAddr: query.Get("advertise"), DataPathAddr: query.Get("datapath"), Alone: httpapi.Bool(r, "alone"),
	})
	if err != nil {
		return err
	}
	return httpapi.WriteJSON(w, http.StatusOK, restored)
}
