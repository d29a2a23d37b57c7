package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"

	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

// endpoint is where a daemon's API is and how to speak with it.
type endpoint struct {
	host          string
	ca, cert, key string // TLS files of a context; empty means none
}

// resolveHost decides which daemon to talk to: -H, SKEP_HOST, DOCKER_HOST, the docker
// context in use, the default.
func (a *app) resolveHost() (endpoint, error) {
	for _, h := range []string{a.host, a.Getenv("SKEP_HOST"), a.Getenv("DOCKER_HOST")} {
		if h != "" {
			if err := checkHost(h); err != nil {
				return endpoint{}, err
			}
			return endpoint{host: h}, nil
		}
	}
	name, err := a.currentContext()
	if err != nil {
		return endpoint{}, err
	}
	if name == "" || name == "default" {
		return endpoint{host: DefaultHost}, nil
	}
	return a.readContext(name)
}

// connect returns a client of the daemon to talk to.
func (a *app) connect() (*client.Client, error) {
	e, err := a.resolveHost()
	if err != nil {
		return nil, err
	}
	return dial(e)
}

func dial(e endpoint) (*client.Client, error) {
	opts := []client.Opt{client.WithHost(e.host), client.WithUserAgent("skep")}
	switch {
	case e.ca != "" || e.cert != "":
		opts = append(opts, client.WithTLSClientConfig(e.ca, e.cert, e.key))
	case strings.HasPrefix(e.host, "tcp://"):
		opts = append(opts, client.WithTLSClientConfigFromEnv())
	}
	c, err := client.New(opts...)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", e.host, err)
	}
	return c, nil
}

// manager returns a client and the description of its node, which must be a manager.
func (a *app) manager(ctx context.Context) (*client.Client, swarm.Info, error) {
	c, err := a.connect()
	if err != nil {
		return nil, swarm.Info{}, err
	}
	info, err := c.Info(ctx, client.InfoOptions{})
	if err != nil {
		return nil, swarm.Info{}, unreachable(c, err)
	}
	s := info.Info.Swarm
	switch {
	case s.LocalNodeState == swarm.LocalNodeStateInactive || s.LocalNodeState == "":
		return nil, s, errors.New("this node is in no swarm: start one with `skep up` or `docker swarm init`, or join one with `skep up --join TOKEN ADDR`")
	case s.LocalNodeState == swarm.LocalNodeStateLocked:
		return nil, s, errors.New("this manager is locked: unlock it with `docker swarm unlock`")
	case s.LocalNodeState == swarm.LocalNodeStateError:
		return nil, s, fmt.Errorf("this node cannot take part in its swarm: %s", s.Error)
	case !s.ControlAvailable:
		return nil, s, errNotManager
	}
	return c, s, nil
}

// unreachable says what to do when no daemon answers.
func unreachable(c *client.Client, err error) error {
	var sys *os.SyscallError
	if !client.IsErrConnectionFailed(err) && !errors.As(err, &sys) {
		return err
	}
	return fmt.Errorf("no daemon answers at %s: is it running? start one with `skep up`, or choose another with -H or SKEP_HOST", c.DaemonHost())
}

// ask calls an endpoint of a manager that answers with a message of skep.v1. It returns the
// connection, which the caller closes, and the answer's JSON as well.
func (a *app) ask(ctx context.Context, method, path string, query url.Values, body any, answer proto.Message) (*client.Client, []byte, error) {
	d, _, err := a.manager(ctx)
	if err != nil {
		return nil, nil, err
	}
	data, err := call(ctx, d, method, path, query, body)
	if err == nil {
		err = protojson.UnmarshalOptions{DiscardUnknown: true}.Unmarshal(data, answer)
	} else if _, text, ok := strings.Cut(err.Error(), " desc = "); ok {
		err = errors.New(text) // without the words that the transport adds
	}
	if err != nil {
		return nil, nil, errors.Join(err, d.Close())
	}
	return d, data, nil
}

// get reads one of Skep's own endpoints, which the docker client does not know.
func get(ctx context.Context, c *client.Client, path string, query url.Values) ([]byte, error) {
	return call(ctx, c, http.MethodGet, path, query, nil)
}

// call calls one of Skep's own endpoints, with a body that may be nil.
func call(ctx context.Context, c *client.Client, method, path string, query url.Values, body any) ([]byte, error) {
	var content io.Reader = http.NoBody
	contentType := ""
	if body != nil {
		data, err := json.Marshal(body)
		if err != nil {
			return nil, fmt.Errorf("call %s: %w", path, err)
		}
		content, contentType = bytes.NewReader(data), "application/json"
	}
	answer, err := open(ctx, c, method, path, query, contentType, content)
	if err != nil {
		return nil, err
	}
	defer answer.Close() //nolint:errcheck // read to the end below
	data, err := io.ReadAll(io.LimitReader(answer, 64<<20))
	if err != nil {
		return nil, fmt.Errorf("call %s: %w", path, err)
	}
	return data, nil
}

// open calls one of Skep's own endpoints and returns its answer, which the caller closes.
func open(ctx context.Context, c *client.Client, method, path string, query url.Values, contentType string, body io.Reader) (io.ReadCloser, error) {
	dialer := c.Dialer()
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return dialer(ctx) },
	}
	u := url.URL{Scheme: "http", Host: "skep", Path: path, RawQuery: query.Encode()}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), body)
	if err != nil {
		return nil, fmt.Errorf("call %s: %w", path, err)
	}
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return nil, unreachable(c, err)
	}
	if resp.StatusCode == http.StatusOK {
		return resp.Body, nil
	}
	defer resp.Body.Close() //nolint:errcheck // read as far as it matters
	text, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return nil, fmt.Errorf("call %s: %w", path, err)
	}
	var message struct{ Message string }
	known := json.Unmarshal(text, &message) == nil && message.Message != ""
	if known && message.Message != "page not found" {
		return nil, errors.New(message.Message)
	}
	if resp.StatusCode == http.StatusNotFound {
		return nil, fmt.Errorf("the daemon at %s does not know %s: it is not Skep, or older than this program", c.DaemonHost(), path)
	}
	return nil, fmt.Errorf("call %s: %s", path, resp.Status)
}
