package node

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/skep-dev/skep/platform/disk"
)

// savedState is docker-state.json: how this node takes part in its swarm.
type savedState struct {
	LocalAddr          string
	RemoteAddr         string
	ListenAddr         string
	AdvertiseAddr      string
	DataPathAddr       string
	DefaultAddressPool []string
	SubnetSize         uint32
	DataPathPort       uint32
	JoinInProgress     bool
}

const stateFile = "docker-state.json"

// loadState reads the state of a swarm directory; ok is false when there is none.
func loadState(dir string) (s savedState, ok bool, err error) {
	data, err := os.ReadFile(filepath.Join(dir, stateFile))
	if errors.Is(err, fs.ErrNotExist) {
		return s, false, nil
	}
	if err != nil {
		return s, false, fmt.Errorf("read swarm state: %w", err)
	}
	if err := json.Unmarshal(data, &s); err != nil {
		return s, false, fmt.Errorf("read swarm state %s: %w", filepath.Join(dir, stateFile), err)
	}
	return s, true, nil
}

func (s savedState) save(dir string) error {
	data, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("write swarm state: %w", err)
	}
	return disk.WriteFile(filepath.Join(dir, stateFile), data, 0o600)
}
