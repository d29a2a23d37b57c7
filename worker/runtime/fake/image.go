package fake

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/distribution/reference"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/registry"
	godigest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime"
	"github.com/skep-dev/skep/worker/runtime/docker"
)

// imageRecord is one image; Engine.mu guards tags and digests.
type imageRecord struct {
	id      string
	tags    []string // familiar name:tag
	digests []string // familiar name@digest
	size    int64
	script  string
	created time.Time
	config  dockerspec.DockerOCIImage
	tagged  time.Time
}

func itoa(n int) string { return strconv.Itoa(n) }

// canonical returns "docker.io/library/x:tag" or "docker.io/library/x@digest"; what is
// no reference is returned as it is.
func canonical(ref string) string {
	named, err := reference.ParseDockerRef(ref)
	if err != nil {
		return ref
	}
	return named.String()
}

func familiar(named reference.Named) string { return reference.FamiliarString(named) }

func newImage(img Image) *imageRecord {
	name := canonical(img.Ref)
	r := &imageRecord{id: digest("config " + name), size: img.Size, script: img.Script}
	if r.size == 0 {
		r.size = 1 << 20
	}
	r.config.Config = img.Config
	r.config.OS, r.config.Architecture = "linux", "amd64"
	named, err := reference.ParseDockerRef(img.Ref)
	if err != nil {
		panic("fake: bad image reference " + strconv.Quote(img.Ref)) // a mistake in the test itself
	}
	if tagged, ok := named.(reference.NamedTagged); ok {
		r.tags = []string{familiar(tagged)}
	}
	sum := godigest.Digest(digest("manifest " + name))
	if d, ok := named.(reference.Digested); ok {
		sum = d.Digest()
	}
	if with, err := reference.WithDigest(reference.TrimNamed(named), sum); err == nil {
		r.digests = []string{familiar(with)}
	}
	return r
}

// addImage makes r present; as is the reference it was pulled by, empty for all its names.
func (e *Engine) addImage(r *imageRecord, as string) *imageRecord {
	now := time.Now()
	have := e.images[r.id]
	if have == nil {
		c := *r
		c.tags, c.digests, c.created = nil, nil, now
		have = &c
		e.images[r.id] = have
	}
	have.tagged = now
	for _, d := range r.digests {
		if !slices.Contains(have.digests, d) {
			have.digests = append(have.digests, d)
		}
	}
	for _, t := range r.tags {
		if as == "" || canonical(as) == canonical(t) {
			e.moveTag(have, t)
		}
	}
	return have
}

func (e *Engine) moveTag(to *imageRecord, tag string) {
	for _, img := range e.images {
		img.tags = slices.DeleteFunc(img.tags, func(t string) bool { return t == tag })
	}
	to.tags = append(to.tags, tag)
}

// findImage finds by reference, id or id prefix.
func (e *Engine) findImage(ref string) *imageRecord {
	hex := strings.TrimPrefix(ref, "sha256:")
	if img := e.images["sha256:"+hex]; img != nil {
		return img
	}
	if named, err := reference.ParseDockerRef(ref); err == nil {
		want := familiar(named)
		for _, img := range e.images {
			if slices.Contains(img.tags, want) || slices.Contains(img.digests, want) {
				return img
			}
		}
	}
	if len(hex) < 4 {
		return nil
	}
	var found *imageRecord
	for id, img := range e.images {
		if strings.HasPrefix(id, "sha256:"+hex) {
			if found != nil {
				return nil
			}
			found = img
		}
	}
	return found
}

func (e *Engine) imageEvent(action events.Action, img *imageRecord, name string) {
	attrs := map[string]string{"name": name}
	maps.Copy(attrs, img.config.Config.Labels)
	e.bus.Publish(events.Message{Type: events.ImageEventType, Action: action, Actor: events.Actor{ID: img.id, Attributes: attrs}})
}

// Pull implements runtime.Images.
func (e *Engine) Pull(ctx context.Context, ref, _ string, _ *registry.AuthConfig, progress func(runtime.Progress)) error {
	named, err := reference.ParseDockerRef(ref)
	if err != nil {
		return model.Errorf(model.Invalid, "invalid reference format")
	}
	if err := sleep(ctx, e.cfg.PullTime); err != nil {
		return err
	}
	if progress == nil {
		progress = func(runtime.Progress) {}
	}
	r, fresh, err := e.pull(ref, named)
	if err != nil {
		return err
	}
	status := "Image is up to date for "
	if fresh {
		status = "Downloaded newer image for "
	}
	if len(r.digests) > 0 {
		_, sum, _ := strings.Cut(r.digests[0], "@")
		progress(runtime.Progress{Status: "Digest: " + sum})
	}
	progress(runtime.Progress{Status: "Status: " + status + familiar(named)})
	return nil
}

func (e *Engine) pull(ref string, named reference.Named) (*imageRecord, bool, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.pullErrors[canonical(ref)]; err != nil {
		return nil, false, err
	}
	r := e.registry[canonical(ref)]
	switch {
	case r == nil && e.registry != nil:
		return nil, false, model.Errorf(model.NotFound,
			"pull access denied for %s, repository does not exist or may require 'docker login'", reference.FamiliarName(named))
	case r == nil:
		r = newImage(Image{Ref: ref})
	}
	_, had := e.images[r.id]
	img := e.addImage(r, ref)
	e.imageEvent(events.ActionPull, img, familiar(named))
	return img, !had, nil
}

// archive is what Save writes and Load reads.
type archive struct {
	Images []savedImage
}

type savedImage struct {
	Ref    string
	Script string
	Size   int64
	Config dockerspec.DockerOCIImageConfig
}

// Load implements runtime.Images; it reads what Save wrote.
func (e *Engine) Load(_ context.Context, r io.Reader) ([]string, error) {
	var a archive
	if err := json.NewDecoder(r).Decode(&a); err != nil {
		return nil, model.Errorf(model.Invalid, "unrecognized image format")
	}
	var refs []string
	for _, s := range a.Images {
		if _, err := reference.ParseDockerRef(s.Ref); err != nil {
			return refs, model.Errorf(model.Invalid, "invalid reference format")
		}
		e.AddImage(Image(s))
		refs = append(refs, s.Ref)
	}
	return refs, nil
}

// Save implements runtime.Images.
func (e *Engine) Save(_ context.Context, refs []string, w io.Writer) error {
	e.mu.Lock()
	var a archive
	var err error
	for _, ref := range refs {
		img := e.findImage(ref)
		if img == nil {
			err = noImage(ref)
			break
		}
		a.Images = append(a.Images, savedImage{Ref: ref, Script: img.script, Size: img.size, Config: img.config.Config})
	}
	e.mu.Unlock()
	if err != nil {
		return err
	}
	return json.NewEncoder(w).Encode(a)
}

func noImage(ref string) error { return model.Errorf(model.NotFound, "No such image: %s", ref) }

// InspectImage implements runtime.Images.
func (e *Engine) InspectImage(_ context.Context, ref string) (*image.InspectResponse, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	img := e.findImage(ref)
	if img == nil {
		return nil, noImage(ref)
	}
	cfg := img.config.Config
	return &image.InspectResponse{
		ID: img.id, RepoTags: slices.Clone(img.tags), RepoDigests: slices.Clone(img.digests),
		Created: stamp(img.created), Config: &cfg, Architecture: "amd64", Os: "linux", Size: img.size,
		RootFS:   image.RootFS{Type: "layers", Layers: []string{digest("layer " + img.id)}},
		Metadata: image.Metadata{LastTagTime: img.tagged},
	}, nil
}

// ListImages implements runtime.Images.
func (e *Engine) ListImages(context.Context) ([]image.Summary, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	out := make([]image.Summary, 0, len(e.images))
	for _, img := range e.images {
		out = append(out, image.Summary{
			ID: img.id, RepoTags: slices.Clone(img.tags), RepoDigests: slices.Clone(img.digests), Created: img.created.Unix(),
			Labels: img.config.Config.Labels, Size: img.size, SharedSize: -1, Containers: int64(len(e.users(img))),
		})
	}
	slices.SortFunc(out, func(a, b image.Summary) int {
		if a.Created != b.Created {
			return int(b.Created - a.Created)
		}
		return strings.Compare(a.ID, b.ID)
	})
	return out, nil
}

func (e *Engine) users(img *imageRecord) []*record {
	var out []*record
	for _, c := range e.containers {
		if c.image == img {
			out = append(out, c)
		}
	}
	return out
}

// History implements runtime.Images.
func (e *Engine) History(_ context.Context, ref string) ([]image.HistoryResponseItem, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	img := e.findImage(ref)
	if img == nil {
		return nil, noImage(ref)
	}
	return []image.HistoryResponseItem{{ID: img.id, Created: img.created.Unix(), Tags: slices.Clone(img.tags), Size: img.size}}, nil
}

// Tag implements runtime.ImageEditor.
func (e *Engine) Tag(_ context.Context, source, target string) error {
	named, err := reference.ParseNormalizedNamed(target)
	if err != nil {
		return model.Errorf(model.Invalid, "Error parsing reference: %q is not a valid repository/tag: invalid reference format", target)
	}
	if _, ok := named.(reference.Digested); ok {
		return model.Errorf(model.Invalid, "refusing to create a tag with a digest reference")
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	img := e.findImage(source)
	if img == nil {
		return noImage(source)
	}
	e.moveTag(img, familiar(reference.TagNameOnly(named)))
	img.tagged = time.Now()
	e.imageEvent(events.ActionTag, img, familiar(reference.TagNameOnly(named)))
	return nil
}

// RemoveImage implements runtime.ImageEditor.
func (e *Engine) RemoveImage(_ context.Context, ref string, force bool) ([]image.DeleteResponse, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	img := e.findImage(ref)
	if img == nil {
		return nil, noImage(ref)
	}
	users := e.users(img)
	name := ""
	if named, err := reference.ParseDockerRef(ref); err == nil && slices.Contains(append(slices.Clone(img.tags), img.digests...), familiar(named)) {
		name = familiar(named)
	}
	if name == "" && len(img.tags) > 1 && !force {
		return nil, model.Errorf(model.Conflict, "conflict: unable to delete %s (must be forced) - image is referenced in multiple repositories", short(img.id))
	}
	if last := name == "" || len(img.tags) <= 1; last {
		for _, c := range users {
			switch {
			case c.running():
				return nil, model.Errorf(model.Conflict, "conflict: unable to delete %s (cannot be forced) - image is being used by running container %s", short(img.id), c.id[:12])
			case !force:
				return nil, model.Errorf(model.Conflict, "conflict: unable to remove repository reference %q (must force) - container %s is using its referenced image %s", ref, c.id[:12], short(img.id))
			}
		}
	}
	var out []image.DeleteResponse
	for _, t := range slices.Clone(img.tags) {
		if name == "" || name == t {
			img.tags = slices.DeleteFunc(img.tags, func(x string) bool { return x == t })
			out = append(out, image.DeleteResponse{Untagged: t})
			e.imageEvent(events.ActionUnTag, img, t)
		}
	}
	if len(img.tags) > 0 {
		return out, nil
	}
	for _, d := range img.digests {
		out = append(out, image.DeleteResponse{Untagged: d})
	}
	if len(users) == 0 {
		delete(e.images, img.id)
		out = append(out, image.DeleteResponse{Deleted: img.id})
		e.imageEvent(events.ActionDelete, img, img.id)
	}
	return out, nil
}

func short(id string) string { return strings.TrimPrefix(id, "sha256:")[:12] }

// PruneImages implements runtime.ImageEditor.
func (e *Engine) PruneImages(_ context.Context, opts runtime.PruneOptions) ([]image.DeleteResponse, uint64, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	var out []image.DeleteResponse
	var freed uint64
	for id, img := range e.images {
		if len(e.users(img)) > 0 || !opts.All && len(img.tags) > 0 || !docker.Prunable(opts, img.created, img.config.Config.Labels) {
			continue
		}
		for _, t := range img.tags {
			out = append(out, image.DeleteResponse{Untagged: t})
		}
		out = append(out, image.DeleteResponse{Deleted: id})
		freed += uint64(img.size)
		delete(e.images, id)
	}
	return out, freed, nil
}

// Push implements runtime.ImageEditor.
func (e *Engine) Push(_ context.Context, ref string, _ *registry.AuthConfig, progress func(runtime.Progress)) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	named, err := reference.ParseDockerRef(ref)
	if err != nil {
		return model.Errorf(model.Invalid, "invalid reference format")
	}
	img := e.findImage(ref)
	if img == nil {
		return model.Errorf(model.NotFound, "An image does not exist locally with the tag: %s", reference.FamiliarName(named))
	}
	if e.registry != nil {
		e.registry[canonical(ref)] = img
	}
	e.imageEvent(events.ActionPush, img, familiar(named))
	if progress != nil {
		progress(runtime.Progress{Status: fmt.Sprintf("%s: digest: %s size: %d", familiar(named), digest("manifest "+canonical(ref)), img.size)})
	}
	return nil
}

// Distribution implements runtime.ImageEditor.
func (e *Engine) Distribution(_ context.Context, ref string, _ *registry.AuthConfig) (*registry.DistributionInspect, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.pullErrors[canonical(ref)]; err != nil {
		return nil, err
	}
	r := e.registry[canonical(ref)]
	if r == nil && e.registry != nil {
		return nil, model.Errorf(model.NotFound, "errors:\nmanifest unknown: manifest unknown")
	}
	if r == nil {
		r = newImage(Image{Ref: ref})
	}
	if len(r.digests) == 0 {
		return nil, errors.New("image has no digest")
	}
	_, sum, _ := strings.Cut(r.digests[0], "@")
	return &registry.DistributionInspect{
		Descriptor: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: godigest.Digest(sum), Size: 500},
		Platforms:  []ocispec.Platform{{Architecture: "amd64", OS: "linux"}},
	}, nil
}
