// Package plugin calls Docker's out-of-process plugins by their protocol: JSON over HTTP on
// a socket of the machine.
//
// It finds a plugin by its name in Docker's directories, asks what it implements and calls
// its methods. It keeps no state and no connections, so any goroutine may use a Finder; it
// starts no plugins and installs none.
package plugin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/skep-dev/skep/core/model"
)

const (
	contentType = "application/vnd.docker.plugins.v1.2+json"
	// callTimeout bounds one call of a plugin.
	callTimeout = 5 * time.Second
	// maxAnswer bounds what a plugin may answer: the largest secret in base64, twice.
	maxAnswer = 2 << 20
)

// Finder finds plugins. The zero value looks where Docker does.
type Finder struct {
	// SocketDir holds NAME.sock or NAME/NAME.sock; empty is /run/docker/plugins.
	SocketDir string
	// SpecDirs hold NAME.spec, a file with a unix:// address; nil is /etc/docker/plugins
	// and /usr/lib/docker/plugins.
	SpecDirs []string
}

func (f Finder) dirs() (sockets string, specs []string) {
	sockets, specs = f.SocketDir, f.SpecDirs
	if sockets == "" {
		sockets = "/run/docker/plugins"
	}
	if specs == nil {
		specs = []string{"/etc/docker/plugins", "/usr/lib/docker/plugins"}
	}
	return sockets, specs
}

// nameForm keeps names inside the directories.
var nameForm = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}$`)

// Find returns the socket of a plugin. A plugin that is not there is model.NotFound, with
// the places that were looked at.
func (f Finder) Find(name string) (string, error) {
	if !nameForm.MatchString(name) {
		return "", model.Errorf(model.Invalid, "plugin name %q is not valid", name)
	}
	sockets, specs := f.dirs()
	for _, path := range []string{filepath.Join(sockets, name+".sock"), filepath.Join(sockets, name, name+".sock")} {
		if info, err := os.Stat(path); err == nil && info.Mode()&fs.ModeSocket != 0 {
			return path, nil
		}
	}
	for _, dir := range specs {
		path := filepath.Join(dir, name+".spec")
		data, err := readSpec(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return "", fmt.Errorf("find plugin %s: %w", name, err)
		}
		socket, ok := strings.CutPrefix(strings.TrimSpace(data), "unix://")
		if !ok || !filepath.IsAbs(socket) {
			return "", model.Errorf(model.Unimplemented, "plugin %q: %s names no unix:///SOCKET, which is all that skep calls plugins by", name, path)
		}
		return socket, nil
	}
	return "", model.Errorf(model.NotFound, "plugin %q not found: there is no %s.sock in %s and no %s.spec in %s on this manager",
		name, name, sockets, name, strings.Join(specs, " or "))
}

// readSpec reads the first kilobyte of a file.
func readSpec(path string) (string, error) {
	file, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer file.Close() //nolint:errcheck // only read
	data, err := io.ReadAll(io.LimitReader(file, 1<<10))
	return string(data), err
}

// Check finds a plugin and asks whether it implements a capability.
func (f Finder) Check(ctx context.Context, name, capability string) error {
	socket, err := f.Find(name)
	if err != nil {
		return err
	}
	var manifest struct{ Implements []string }
	if err := call(ctx, socket, "Plugin.Activate", struct{}{}, &manifest); err != nil {
		return fmt.Errorf("activate plugin %q: %w", name, err)
	}
	if !slices.ContainsFunc(manifest.Implements, func(i string) bool { return strings.EqualFold(i, capability) }) {
		return model.Errorf(model.Invalid, "plugin %q does not implement %s, but %s", name, capability, strings.Join(manifest.Implements, ", "))
	}
	return nil
}

// Call calls a method of a plugin and decodes its answer.
func (f Finder) Call(ctx context.Context, name, method string, request, answer any) error {
	socket, err := f.Find(name)
	if err != nil {
		return err
	}
	if err := call(ctx, socket, method, request, answer); err != nil {
		return fmt.Errorf("call %s of plugin %q: %w", method, name, err)
	}
	return nil
}

func call(ctx context.Context, socket, method string, request, answer any) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	body, err := json.Marshal(request)
	if err != nil {
		return err
	}
	target := url.URL{Scheme: "http", Host: "plugin", Path: "/" + method}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, target.String(), bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Accept", contentType)
	req.Header.Set("Content-Type", contentType)
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
	}
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return model.Wrap(model.Unavailable, err, "reach it")
	}
	defer resp.Body.Close() //nolint:errcheck // only read
	return decode(resp, answer)
}

// decode reads the answer of a plugin, or the error that it is.
func decode(resp *http.Response, answer any) error {
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return model.Wrap(model.Unavailable, err, "read its answer")
	}
	if len(data) > maxAnswer {
		return model.Errorf(model.Internal, "it answers with more than %d bytes", maxAnswer)
	}
	if resp.StatusCode != http.StatusOK {
		var fault struct{ Err string }
		if json.Unmarshal(data, &fault) != nil || fault.Err == "" {
			fault.Err = resp.Status
		}
		return model.Errorf(model.Internal, "it answers: %s", fault.Err)
	}
	if err := json.Unmarshal(data, answer); err != nil {
		// What it answered may be a secret, so the text of the fault is not shown.
		return model.Errorf(model.Internal, "its answer is not the JSON that is expected")
	}
	return nil
}
