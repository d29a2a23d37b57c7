package shim

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// Exit is how a container's main process ended.
type Exit struct {
	Code uint32
	At   time.Time
}

// WriteExit replaces the file at path. It does not sync: after a power cut the machine's
// containers have ended otherwise anyway.
func WriteExit(path string, e Exit) error {
	b, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("encode exit status: %w", err)
	}
	tmp := filepath.Join(filepath.Dir(path), ".exit.tmp")
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return fmt.Errorf("write exit status: %w", err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("write exit status: %w", err)
	}
	return nil
}

// ReadExit reads what WriteExit wrote.
func ReadExit(path string) (Exit, error) {
	var e Exit
	b, err := os.ReadFile(path)
	if err != nil {
		return e, fmt.Errorf("read exit status: %w", err)
	}
	if err := json.Unmarshal(b, &e); err != nil {
		return e, fmt.Errorf("read exit status: %w", err)
	}
	return e, nil
}
