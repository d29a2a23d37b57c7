package containerd

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/moby/moby/api/types/image"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/skep-dev/skep/core/model"
)

// dangling is the repository under which images live that lost their last name but have
// not been removed. It never leaves this package.
const dangling = "dangling.skep.invalid/image"

// imageInfo is what an image's immutable content says.
type imageInfo struct {
	id       string // digest of the configuration, Docker's image id
	target   ocispec.Descriptor
	manifest ocispec.Manifest
	config   dockerspec.DockerOCIImage
	chain    string // the snapshot that holds all layers
}

// namedImage is an image with its names, familiar ones.
type namedImage struct {
	*imageInfo
	tags    []string // name:tag
	digests []string // name@digest
	names   []string // containerd's names, dangling ones included
	updated time.Time
}

// imageStore reads containerd's images as Docker's. mu guards the caches.
type imageStore struct {
	e *Engine

	mu    sync.Mutex
	infos map[digest.Digest]*imageInfo // by target; dropped when the image is removed
	sizes map[string]int64             // by chain
}

func newImageStore(e *Engine) *imageStore {
	return &imageStore{e: e, infos: map[digest.Digest]*imageInfo{}, sizes: map[string]int64{}}
}

func noImage(ref string) error { return model.Errorf(model.NotFound, "No such image: %s", ref) }

// info reads an image's content for this machine's platform.
func (s *imageStore) info(ctx context.Context, target ocispec.Descriptor) (*imageInfo, error) {
	s.mu.Lock()
	i := s.infos[target.Digest]
	s.mu.Unlock()
	if i != nil {
		return i, nil
	}
	store := s.e.client.ContentStore()
	m, err := images.Manifest(ctx, store, target, platforms.Default())
	if err != nil {
		return nil, fmt.Errorf("read image manifest: %w", err)
	}
	b, err := content.ReadBlob(ctx, store, m.Config)
	if err != nil {
		return nil, fmt.Errorf("read image configuration: %w", err)
	}
	i = &imageInfo{id: m.Config.Digest.String(), target: target, manifest: m}
	if err := json.Unmarshal(b, &i.config); err != nil {
		return nil, fmt.Errorf("read image configuration: %w", err)
	}
	i.chain = identity.ChainID(i.config.RootFS.DiffIDs).String()
	s.mu.Lock()
	s.infos[target.Digest] = i
	s.mu.Unlock()
	return i, nil
}

// all returns every image that can be used here, by id.
func (s *imageStore) all(ctx context.Context) (map[string]*namedImage, error) {
	list, err := s.e.client.ImageService().List(ctx)
	if err != nil {
		return nil, fmt.Errorf("list images: %w", err)
	}
	out := map[string]*namedImage{}
	for _, img := range list {
		i, err := s.info(ctx, img.Target)
		if errdefs.IsNotFound(err) { // of another platform, or being fetched
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("image %s: %w", img.Name, err)
		}
		n := out[i.id]
		if n == nil {
			n = &namedImage{imageInfo: i}
			out[i.id] = n
		}
		n.add(img)
	}
	for _, n := range out {
		slices.Sort(n.tags)
		slices.Sort(n.digests)
	}
	return out, nil
}

func (n *namedImage) add(img images.Image) {
	n.names = append(n.names, img.Name)
	if img.UpdatedAt.After(n.updated) {
		n.updated = img.UpdatedAt
	}
	named, err := reference.ParseNormalizedNamed(img.Name)
	if err != nil || named.Name() == dangling {
		return
	}
	if tagged, ok := named.(reference.NamedTagged); ok {
		n.tags = append(n.tags, reference.FamiliarString(tagged))
	}
	with, err := reference.WithDigest(reference.TrimNamed(named), img.Target.Digest)
	if err == nil && !slices.Contains(n.digests, reference.FamiliarString(with)) {
		n.digests = append(n.digests, reference.FamiliarString(with))
	}
}

// resolve finds an image by reference, id or id prefix.
func (s *imageStore) resolve(ctx context.Context, ref string) (*imageInfo, error) {
	if named, err := reference.ParseDockerRef(ref); err == nil {
		img, err := s.e.client.ImageService().Get(ctx, named.String())
		if err == nil {
			return s.info(ctx, img.Target)
		}
		if !errdefs.IsNotFound(err) {
			return nil, fmt.Errorf("find image: %w", err)
		}
	}
	n, err := s.named(ctx, ref)
	if err != nil {
		return nil, err
	}
	return n.imageInfo, nil
}

// named finds an image with all its names.
func (s *imageStore) named(ctx context.Context, ref string) (*namedImage, error) {
	all, err := s.all(ctx)
	if err != nil {
		return nil, err
	}
	hex := strings.TrimPrefix(ref, "sha256:")
	if n := all["sha256:"+hex]; n != nil {
		return n, nil
	}
	if named, err := reference.ParseDockerRef(ref); err == nil {
		want := reference.FamiliarString(named)
		for _, n := range all {
			if slices.Contains(n.tags, want) || slices.Contains(n.digests, want) {
				return n, nil
			}
		}
	}
	var found *namedImage
	if len(hex) >= 4 {
		for id, n := range all {
			if strings.HasPrefix(id, "sha256:"+hex) {
				if found != nil {
					return nil, noImage(ref)
				}
				found = n
			}
		}
	}
	if found == nil {
		return nil, noImage(ref)
	}
	return found, nil
}

// size returns the bytes that an image's layers take unpacked.
func (s *imageStore) size(ctx context.Context, i *imageInfo) int64 {
	s.mu.Lock()
	n, ok := s.sizes[i.chain]
	s.mu.Unlock()
	if ok {
		return n
	}
	sn := s.e.client.SnapshotService(snapshotter)
	for k := range i.config.RootFS.DiffIDs {
		u, err := sn.Usage(ctx, identity.ChainID(i.config.RootFS.DiffIDs[:k+1]).String())
		if err != nil {
			return -1 // not unpacked
		}
		n += u.Size
	}
	s.mu.Lock()
	s.sizes[i.chain] = n
	s.mu.Unlock()
	return n
}

func (s *imageStore) drop(i *imageInfo) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.infos, i.target.Digest)
	delete(s.sizes, i.chain)
}

// InspectImage implements runtime.Images.
func (e *Engine) InspectImage(ctx context.Context, ref string) (*image.InspectResponse, error) {
	ctx = e.ns(ctx)
	n, err := e.images.named(ctx, ref)
	if err != nil {
		return nil, err
	}
	cfg := n.config.Config
	r := &image.InspectResponse{
		ID: n.id, RepoTags: orEmpty(n.tags), RepoDigests: orEmpty(n.digests), Author: n.config.Author,
		Config: &cfg, Architecture: n.config.Architecture, Variant: n.config.Variant, Os: n.config.OS,
		OsVersion: n.config.OSVersion, Size: e.images.size(ctx, n.imageInfo),
		RootFS:   image.RootFS{Type: n.config.RootFS.Type},
		Metadata: image.Metadata{LastTagTime: n.updated}, Descriptor: &n.target,
	}
	if n.config.Created != nil {
		r.Created = n.config.Created.UTC().Format(time.RFC3339Nano)
	}
	for _, d := range n.config.RootFS.DiffIDs {
		r.RootFS.Layers = append(r.RootFS.Layers, d.String())
	}
	for _, h := range slices.Backward(n.config.History) {
		r.Comment = h.Comment
		break
	}
	return r, nil
}

func orEmpty(s []string) []string {
	if s == nil {
		return []string{}
	}
	return s
}

// ListImages implements runtime.Images.
func (e *Engine) ListImages(ctx context.Context) ([]image.Summary, error) {
	ctx = e.ns(ctx)
	all, err := e.images.all(ctx)
	if err != nil {
		return nil, err
	}
	users := e.imageUsers()
	out := make([]image.Summary, 0, len(all))
	for _, n := range all {
		s := image.Summary{
			ID: n.id, RepoTags: orEmpty(n.tags), RepoDigests: orEmpty(n.digests), Labels: n.config.Config.Labels,
			Size: e.images.size(ctx, n.imageInfo), SharedSize: -1, Containers: int64(len(users[n.id])),
		}
		if n.config.Created != nil {
			s.Created = n.config.Created.Unix()
		}
		out = append(out, s)
	}
	slices.SortFunc(out, func(a, b image.Summary) int {
		if a.Created != b.Created {
			return int(min(max(b.Created-a.Created, -1), 1))
		}
		return strings.Compare(a.ID, b.ID)
	})
	return out, nil
}

// imageUsers returns the containers of each image, by image id.
func (e *Engine) imageUsers() map[string][]saved {
	e.mu.Lock()
	defer e.mu.Unlock()
	out := map[string][]saved{}
	for _, c := range e.containers {
		out[c.ImageID] = append(out[c.ImageID], c.saved)
	}
	return out
}

// History implements runtime.Images.
func (e *Engine) History(ctx context.Context, ref string) ([]image.HistoryResponseItem, error) {
	ctx = e.ns(ctx)
	n, err := e.images.named(ctx, ref)
	if err != nil {
		return nil, err
	}
	sn := e.client.SnapshotService(snapshotter)
	out := []image.HistoryResponseItem{}
	layer := 0
	for _, h := range n.config.History {
		item := image.HistoryResponseItem{ID: "<missing>", CreatedBy: h.CreatedBy, Comment: h.Comment}
		if h.Created != nil {
			item.Created = h.Created.Unix()
		}
		if !h.EmptyLayer && layer < len(n.config.RootFS.DiffIDs) {
			layer++
			if u, err := sn.Usage(ctx, identity.ChainID(n.config.RootFS.DiffIDs[:layer]).String()); err == nil {
				item.Size = u.Size
			}
		}
		out = append(out, item)
	}
	if len(out) == 0 {
		out = append(out, image.HistoryResponseItem{Size: e.images.size(ctx, n.imageInfo)})
	}
	slices.Reverse(out)
	out[0].ID, out[0].Tags = n.id, n.tags
	return out, nil
}
