package containerd

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	ctd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	ctddocker "github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/registry"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime"
)

// resolver returns what talks to named's registry. Registries on loopback, and those that
// the configuration says so of, may speak plain HTTP or show a certificate that nobody
// signed, as with Docker.
func (e *Engine) resolver(named reference.Named, auth *registry.AuthConfig) remotes.Resolver {
	host := reference.Domain(named)
	transport := http.DefaultTransport.(*http.Transport).Clone()
	client := &http.Client{Transport: transport}
	if local, err := ctddocker.MatchLocalhost(host); err == nil && local || insecure(host, e.cfg.InsecureRegistries) {
		transport.TLSClientConfig = &tls.Config{InsecureSkipVerify: true} //nolint:gosec // the machine itself, or what its owner trusts
		client.Transport = ctddocker.NewHTTPFallback(transport)
	}
	authOpts := []ctddocker.AuthorizerOpt{ctddocker.WithAuthClient(client)}
	var header http.Header
	if auth != nil {
		authOpts = append(authOpts, ctddocker.WithAuthCreds(func(asked string) (string, string, error) {
			switch {
			case asked != host && (host != "docker.io" || !strings.HasSuffix(asked, ".docker.io")):
				return "", "", nil
			case auth.IdentityToken != "":
				return "", auth.IdentityToken, nil
			}
			return auth.Username, auth.Password, nil
		}))
		if auth.RegistryToken != "" {
			header = http.Header{"Authorization": {"Bearer " + auth.RegistryToken}}
		}
	}
	opts := []ctddocker.RegistryOpt{ctddocker.WithClient(client)}
	if header == nil {
		opts = append(opts, ctddocker.WithAuthorizer(ctddocker.NewDockerAuthorizer(authOpts...)))
	}
	return ctddocker.NewResolver(ctddocker.ResolverOptions{Headers: header, Hosts: ctddocker.ConfigureDefaultRegistries(opts...)})
}

// insecure reports whether a registry is in a list of hosts, host:ports and networks.
func insecure(host string, list []string) bool {
	name, _, err := net.SplitHostPort(host)
	if err != nil {
		name = strings.Trim(host, "[]")
	}
	addr, _ := netip.ParseAddr(name)
	return slices.ContainsFunc(list, func(entry string) bool {
		if network, err := netip.ParsePrefix(entry); err == nil {
			return network.Contains(addr)
		}
		return entry == host || entry == name
	})
}

// registryError translates what a registry answered into Docker's words.
func registryError(named reference.Named, err error) error {
	var status interface{ HTTPStatus() int }
	text := err.Error()
	name := reference.FamiliarName(named)
	var netErr *net.OpError
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case errdefs.IsNotFound(err):
		return model.Wrap(model.NotFound, nil2(err), fmt.Sprintf("manifest for %s not found: manifest unknown", reference.FamiliarString(named)))
	case errors.As(err, &status) && status.HTTPStatus() == http.StatusUnauthorized,
		strings.Contains(text, "401 Unauthorized"), strings.Contains(text, "403 Forbidden"),
		errdefs.IsUnauthorized(err), errdefs.IsPermissionDenied(err), strings.Contains(text, "authorization failed"), strings.Contains(text, "no basic auth credentials"):
		return model.Wrap(model.Denied, err, fmt.Sprintf("pull access denied for %s, repository does not exist or may require 'docker login'", name))
	case errors.As(err, &netErr):
		return model.Wrap(model.Unavailable, err, "reach registry "+reference.Domain(named))
	}
	return fmt.Errorf("transfer image %s: %w", reference.FamiliarString(named), err)
}

func nil2(err error) error { return errors.New(strings.TrimSuffix(err.Error(), ": not found")) }

// Pull implements runtime.Images.
func (e *Engine) Pull(ctx context.Context, ref, platform string, auth *registry.AuthConfig, progress func(runtime.Progress)) error {
	ctx = e.ns(ctx)
	named, err := reference.ParseDockerRef(ref)
	if err != nil {
		return model.Errorf(model.Invalid, "invalid reference format: %w", err)
	}
	matcher := platforms.Default()
	if platform != "" {
		p, err := platforms.Parse(platform)
		if err != nil {
			return model.Errorf(model.Invalid, "invalid platform %q: %w", platform, err)
		}
		matcher = platforms.Only(p)
	}
	if progress == nil {
		progress = func(runtime.Progress) {}
	}
	ctx, done, err := e.client.WithLease(ctx)
	if err != nil {
		return fmt.Errorf("pull %s: %w", ref, err)
	}
	defer func() { _ = done(context.WithoutCancel(ctx)) }() // leases expire by themselves

	r := e.resolver(named, auth)
	_, target, err := r.Resolve(ctx, named.String())
	if err != nil {
		return registryError(named, err)
	}
	switch tagged := named.(type) {
	case reference.NamedTagged:
		progress(runtime.Progress{ID: tagged.Tag(), Status: "Pulling from " + reference.Path(named)})
	default:
		progress(runtime.Progress{Status: "Pulling from " + reference.Path(named)})
	}
	old, oldErr := e.client.ImageService().Get(ctx, named.String())
	if oldErr == nil && old.Target.Digest != target.Digest {
		if err := e.images.hang(ctx, old.Target, named.String()); err != nil {
			return err
		}
	}
	watch := newTransfer(e, progress)
	stop := watch.run(ctx)
	img, err := e.client.Pull(ctx, named.String(), ctd.WithResolver(r), ctd.WithPlatformMatcher(matcher),
		ctd.WithPullUnpack, ctd.WithPullSnapshotter(snapshotter), ctd.WithImageHandler(images.HandlerFunc(watch.see)),
		ctd.WithMaxConcurrentDownloads(3))
	stop(err == nil)
	if err != nil {
		return registryError(named, err)
	}
	if err := e.images.unhang(ctx, img.Target()); err != nil {
		return err
	}
	i, err := e.images.info(ctx, img.Target())
	if err != nil {
		return fmt.Errorf("pull %s: %w", ref, err)
	}
	e.imageEvent(events.ActionPull, reference.FamiliarString(named), reference.FamiliarName(named), i.config.Config.Labels)
	progress(runtime.Progress{Status: "Digest: " + img.Target().Digest.String()})
	if oldErr == nil && old.Target.Digest == target.Digest {
		progress(runtime.Progress{Status: "Status: Image is up to date for " + reference.FamiliarString(named)})
	} else {
		progress(runtime.Progress{Status: "Status: Downloaded newer image for " + reference.FamiliarString(named)})
	}
	return nil
}

// transfer reports the progress of a pull by looking at the content store.
type transfer struct {
	e        *Engine
	progress func(runtime.Progress)

	mu     sync.Mutex
	layers []ocispec.Descriptor
	had    map[string]bool // layers that were there before
}

func newTransfer(e *Engine, progress func(runtime.Progress)) *transfer {
	return &transfer{e: e, progress: progress, had: map[string]bool{}}
}

// see is called for each descriptor that is about to be fetched.
func (t *transfer) see(ctx context.Context, d ocispec.Descriptor) ([]ocispec.Descriptor, error) {
	if !images.IsLayerType(d.MediaType) {
		return nil, nil
	}
	info, err := t.e.client.ContentStore().Info(ctx, d.Digest)
	t.mu.Lock()
	defer t.mu.Unlock()
	if slices.ContainsFunc(t.layers, func(o ocispec.Descriptor) bool { return o.Digest == d.Digest }) {
		return nil, nil
	}
	t.layers = append(t.layers, d)
	t.had[d.Digest.String()] = err == nil && info.Size == d.Size && info.CreatedAt.Before(time.Now().Add(-time.Second))
	status := "Pulling fs layer"
	if t.had[d.Digest.String()] {
		status = "Already exists"
	}
	t.progress(runtime.Progress{ID: d.Digest.Encoded()[:12], Status: status})
	return nil, nil
}

// run reports until the returned function is called.
func (t *transfer) run(ctx context.Context) (stop func(complete bool)) {
	quit, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(200 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				t.report(ctx)
			case <-quit:
				return
			}
		}
	}()
	return func(complete bool) {
		close(quit)
		<-ended
		if !complete {
			return
		}
		for _, d := range t.layers {
			if !t.had[d.Digest.String()] {
				t.progress(runtime.Progress{ID: d.Digest.Encoded()[:12], Status: "Pull complete"})
			}
		}
	}
}

func (t *transfer) report(ctx context.Context) {
	active, err := t.e.client.ContentStore().ListStatuses(ctx, "")
	if err != nil {
		return // only a report
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, s := range active {
		for _, d := range t.layers {
			if strings.HasSuffix(s.Ref, d.Digest.String()) {
				t.progress(runtime.Progress{ID: d.Digest.Encoded()[:12], Status: "Downloading", Current: s.Offset, Total: s.Total})
			}
		}
	}
}

// Push implements runtime.ImageEditor.
func (e *Engine) Push(ctx context.Context, ref string, auth *registry.AuthConfig, progress func(runtime.Progress)) error {
	ctx = e.ns(ctx)
	named, err := reference.ParseDockerRef(ref)
	if err != nil {
		return model.Errorf(model.Invalid, "invalid reference format: %w", err)
	}
	img, err := e.client.ImageService().Get(ctx, named.String())
	if errdefs.IsNotFound(err) {
		return model.Errorf(model.NotFound, "An image does not exist locally with the tag: %s", reference.FamiliarName(named))
	}
	if err != nil {
		return fmt.Errorf("push %s: %w", ref, err)
	}
	if progress == nil {
		progress = func(runtime.Progress) {}
	}
	i, err := e.images.info(ctx, img.Target)
	if err != nil {
		return fmt.Errorf("push %s: %w", ref, err)
	}
	progress(runtime.Progress{Status: fmt.Sprintf("The push refers to repository [%s]", named.Name())})
	for _, l := range i.manifest.Layers {
		progress(runtime.Progress{ID: l.Digest.Encoded()[:12], Status: "Preparing"})
	}
	target, err := e.pushable(ctx, img.Target)
	if err != nil {
		return err
	}
	if err := e.client.Push(ctx, named.String(), target, ctd.WithResolver(e.resolver(named, auth)), ctd.WithPlatformMatcher(platforms.Default())); err != nil {
		return registryError(named, err)
	}
	for _, l := range i.manifest.Layers {
		progress(runtime.Progress{ID: l.Digest.Encoded()[:12], Status: "Pushed"})
	}
	e.imageEvent(events.ActionPush, reference.FamiliarString(named), reference.FamiliarName(named), i.config.Config.Labels)
	tag := ""
	if t, ok := named.(reference.NamedTagged); ok {
		tag = t.Tag()
	}
	progress(runtime.Progress{Status: fmt.Sprintf("%s: digest: %s size: %d", tag, target.Digest, target.Size)})
	progress(runtime.Progress{Aux: map[string]any{"Tag": tag, "Digest": target.Digest.String(), "Size": target.Size}})
	return nil
}

// pushable returns target, or this platform's manifest if target is an index whose other
// platforms are not here.
func (e *Engine) pushable(ctx context.Context, target ocispec.Descriptor) (ocispec.Descriptor, error) {
	if !images.IsIndexType(target.MediaType) {
		return target, nil
	}
	store := e.client.ContentStore()
	b, err := content.ReadBlob(ctx, store, target)
	if err != nil {
		return target, fmt.Errorf("read image index: %w", err)
	}
	var index ocispec.Index
	if err := json.Unmarshal(b, &index); err != nil {
		return target, fmt.Errorf("read image index: %w", err)
	}
	complete := true
	own := target
	for _, m := range index.Manifests {
		if _, err := store.Info(ctx, m.Digest); err != nil {
			complete = false
			continue
		}
		if m.Platform == nil || platforms.Default().Match(*m.Platform) {
			own = m
		}
	}
	if complete {
		return target, nil
	}
	return own, nil
}

// Distribution implements runtime.ImageEditor.
func (e *Engine) Distribution(ctx context.Context, ref string, auth *registry.AuthConfig) (*registry.DistributionInspect, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	named, err := reference.ParseDockerRef(ref)
	if err != nil {
		return nil, model.Errorf(model.Invalid, "invalid reference format: %w", err)
	}
	r := e.resolver(named, auth)
	name, target, err := r.Resolve(ctx, named.String())
	if err != nil {
		return nil, registryError(named, err)
	}
	fetcher, err := r.Fetcher(ctx, name)
	if err != nil {
		return nil, registryError(named, err)
	}
	out := &registry.DistributionInspect{Descriptor: ocispec.Descriptor{MediaType: target.MediaType, Digest: target.Digest, Size: target.Size}}
	if images.IsIndexType(target.MediaType) {
		var index ocispec.Index
		if err := fetchJSON(ctx, fetcher, target, &index); err != nil {
			return nil, registryError(named, err)
		}
		for _, m := range index.Manifests {
			if m.Platform != nil {
				out.Platforms = append(out.Platforms, *m.Platform)
			}
		}
		return out, nil
	}
	var m ocispec.Manifest
	var p ocispec.Platform
	if err := fetchJSON(ctx, fetcher, target, &m); err != nil {
		return nil, registryError(named, err)
	}
	if err := fetchJSON(ctx, fetcher, m.Config, &p); err != nil {
		return nil, registryError(named, err)
	}
	out.Platforms = []ocispec.Platform{p}
	return out, nil
}

// maxMetadata bounds a manifest or configuration that a registry sends.
const maxMetadata = 8 << 20

func fetchJSON(ctx context.Context, f remotes.Fetcher, d ocispec.Descriptor, into any) error {
	rc, err := f.Fetch(ctx, d)
	if err != nil {
		return err
	}
	defer func() { _ = rc.Close() }() // only read from
	return json.NewDecoder(http.MaxBytesReader(nil, rc, maxMetadata)).Decode(into)
}
