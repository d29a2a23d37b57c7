package cli

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// contextName is the docker context that `skep up` makes.
const contextName = "skep"

// dockerMeta is a context as the docker client keeps it in contexts/meta/<id>/meta.json,
// where id is the SHA-256 of the name.
type dockerMeta struct {
	Name      string
	Metadata  map[string]any
	Endpoints map[string]dockerEndpoint
}

type dockerEndpoint struct {
	Host          string `json:",omitempty"`
	SkipTLSVerify bool
}

// dockerDir returns the directory of the docker client's configuration.
func (a *app) dockerDir() (string, error) {
	if dir := a.Getenv("DOCKER_CONFIG"); dir != "" {
		return dir, nil
	}
	home := a.Getenv("HOME")
	if home == "" {
		return "", errors.New("find docker configuration: set HOME or DOCKER_CONFIG")
	}
	return filepath.Join(home, ".docker"), nil
}

func contextID(name string) string {
	sum := sha256.Sum256([]byte(name))
	return hex.EncodeToString(sum[:])
}

// currentContext returns the name of the docker context in use, empty for none.
func (a *app) currentContext() (string, error) {
	if name := a.Getenv("DOCKER_CONTEXT"); name != "" {
		return name, nil
	}
	dir, err := a.dockerDir()
	if err != nil {
		return "", nil //nolint:nilerr // without a home there is no context
	}
	data, err := os.ReadFile(filepath.Join(dir, "config.json"))
	if errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("read docker configuration: %w", err)
	}
	var cfg struct {
		CurrentContext string `json:"currentContext"`
	}
	if err := json.Unmarshal(data, &cfg); err != nil {
		return "", fmt.Errorf("read docker configuration: %w", err)
	}
	return cfg.CurrentContext, nil
}

// readContext returns the endpoint of a docker context.
func (a *app) readContext(name string) (endpoint, error) {
	dir, err := a.dockerDir()
	if err != nil {
		return endpoint{}, err
	}
	data, err := os.ReadFile(filepath.Join(dir, "contexts", "meta", contextID(name), "meta.json"))
	if errors.Is(err, os.ErrNotExist) {
		return endpoint{}, fmt.Errorf("docker context %q does not exist: choose one with `docker context use`, or name a host with -H", name)
	}
	if err != nil {
		return endpoint{}, fmt.Errorf("read docker context %q: %w", name, err)
	}
	var meta dockerMeta
	if err := json.Unmarshal(data, &meta); err != nil {
		return endpoint{}, fmt.Errorf("read docker context %q: %w", name, err)
	}
	e := endpoint{host: meta.Endpoints["docker"].Host}
	if e.host == "" {
		return endpoint{}, fmt.Errorf("docker context %q names no docker endpoint", name)
	}
	if err := checkHost(e.host); err != nil {
		return endpoint{}, fmt.Errorf("use docker context %q: %w", name, err)
	}
	tls := filepath.Join(dir, "contexts", "tls", contextID(name), "docker")
	for file, field := range map[string]*string{"ca.pem": &e.ca, "cert.pem": &e.cert, "key.pem": &e.key} {
		if path := filepath.Join(tls, file); exists(path) {
			*field = path
		}
	}
	return e, nil
}

// writeContext makes or replaces the docker context skep.
func (a *app) writeContext(host string) error {
	dir, err := a.dockerDir()
	if err != nil {
		return err
	}
	data, err := json.Marshal(dockerMeta{
		Name:      contextName,
		Metadata:  map[string]any{"Description": "the Skep node on this machine"},
		Endpoints: map[string]dockerEndpoint{"docker": {Host: host}},
	})
	if err != nil {
		return fmt.Errorf("write docker context: %w", err)
	}
	meta := filepath.Join(dir, "contexts", "meta", contextID(contextName))
	if err := os.MkdirAll(meta, 0o755); err != nil {
		return fmt.Errorf("write docker context: %w", err)
	}
	temp := filepath.Join(meta, "meta.json.new")
	if err := os.WriteFile(temp, data, 0o644); err != nil { //nolint:gosec // as the docker client makes it
		return fmt.Errorf("write docker context: %w", err)
	}
	if err := os.Rename(temp, filepath.Join(meta, "meta.json")); err != nil {
		return fmt.Errorf("write docker context: %w", err)
	}
	return nil
}

// removeContext removes the docker context skep if it is there and points at host.
func (a *app) removeContext(host string) error {
	e, err := a.readContext(contextName)
	if err != nil || e.host != host {
		return nil //nolint:nilerr // nothing of ours to remove
	}
	dir, err := a.dockerDir()
	if err != nil {
		return err
	}
	if err := os.RemoveAll(filepath.Join(dir, "contexts", "meta", contextID(contextName))); err != nil {
		return fmt.Errorf("remove docker context: %w", err)
	}
	return nil
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
