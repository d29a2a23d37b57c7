package containerd

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/image"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime"
	"github.com/skep-dev/skep/worker/runtime/docker"
)

// setName points a name at target. An image that loses its last name by that stays, as
// one without a name.
func (s *imageStore) setName(ctx context.Context, name string, target ocispec.Descriptor) error {
	store := s.e.client.ImageService()
	old, err := store.Get(ctx, name)
	switch {
	case errdefs.IsNotFound(err):
		_, err = store.Create(ctx, images.Image{Name: name, Target: target})
		if err != nil {
			return fmt.Errorf("name image: %w", err)
		}
		return s.unhang(ctx, target)
	case err != nil:
		return fmt.Errorf("name image: %w", err)
	}
	if old.Target.Digest != target.Digest {
		if err := s.hang(ctx, old.Target, name); err != nil {
			return err
		}
	}
	if _, err := store.Update(ctx, images.Image{Name: name, Target: target}); err != nil {
		return fmt.Errorf("name image: %w", err)
	}
	return s.unhang(ctx, target)
}

// hang keeps target under a hidden name if except is the last name it has.
func (s *imageStore) hang(ctx context.Context, target ocispec.Descriptor, except string) error {
	store := s.e.client.ImageService()
	others, err := store.List(ctx, "target.digest=="+target.Digest.String())
	if err != nil {
		return fmt.Errorf("find image names: %w", err)
	}
	for _, o := range others {
		if o.Name != except {
			return nil
		}
	}
	_, err = store.Create(ctx, images.Image{Name: dangling + "@" + target.Digest.String(), Target: target})
	if err != nil && !errdefs.IsAlreadyExists(err) {
		return fmt.Errorf("keep image without name: %w", err)
	}
	return nil
}

// unhang drops the hidden name of target.
func (s *imageStore) unhang(ctx context.Context, target ocispec.Descriptor) error {
	err := s.e.client.ImageService().Delete(ctx, dangling+"@"+target.Digest.String())
	if err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("drop hidden image name: %w", err)
	}
	return nil
}

func (e *Engine) imageEvent(action events.Action, id, name string, labels map[string]string) {
	attrs := maps.Clone(labels)
	if attrs == nil {
		attrs = map[string]string{}
	}
	attrs["name"] = name
	e.bus.Publish(events.Message{Type: events.ImageEventType, Action: action, Actor: events.Actor{ID: id, Attributes: attrs}})
}

// Tag implements runtime.ImageEditor.
func (e *Engine) Tag(ctx context.Context, source, target string) error {
	ctx = e.ns(ctx)
	named, err := reference.ParseNormalizedNamed(target)
	if err != nil {
		return model.Errorf(model.Invalid, "Error parsing reference: %q is not a valid repository/tag: %w", target, err)
	}
	if _, ok := named.(reference.Digested); ok {
		return model.Errorf(model.Invalid, "refusing to create a tag with a digest reference")
	}
	i, err := e.images.resolve(ctx, source)
	if err != nil {
		return err
	}
	named = reference.TagNameOnly(named)
	if err := e.images.setName(ctx, named.String(), i.target); err != nil {
		return err
	}
	e.imageEvent(events.ActionTag, i.id, reference.FamiliarString(named), i.config.Config.Labels)
	return nil
}

func short(id string) string { return strings.TrimPrefix(id, "sha256:")[:12] }

// RemoveImage implements runtime.ImageEditor.
func (e *Engine) RemoveImage(ctx context.Context, ref string, force bool) ([]image.DeleteResponse, error) {
	ctx = e.ns(ctx)
	n, err := e.images.named(ctx, ref)
	if err != nil {
		return nil, err
	}
	users := e.imageUsers()[n.id]
	wanted := n.names
	byName := false
	if named, err := reference.ParseDockerRef(ref); err == nil && !strings.HasPrefix(n.id, "sha256:"+strings.TrimPrefix(ref, "sha256:")) {
		byName = true
		wanted = slices.DeleteFunc(slices.Clone(n.names), func(name string) bool { return name != named.String() })
		if len(wanted) == 0 { // a digest that a tag implies
			wanted = n.names
		}
	}
	if !byName && len(n.tags) > 1 && !force {
		return nil, model.Errorf(model.Conflict, "conflict: unable to delete %s (must be forced) - image is referenced in multiple repositories", short(n.id))
	}
	if len(wanted) == len(n.names) {
		if err := inUse(ref, n.id, users, byName, force); err != nil {
			return nil, err
		}
	}
	var out []image.DeleteResponse
	for i, name := range wanted {
		last := i == len(wanted)-1
		if last && len(wanted) == len(n.names) && len(users) > 0 {
			if err := e.images.hang(ctx, n.target, name); err != nil {
				return out, err
			}
		}
		var opts []images.DeleteOpt
		if last {
			opts = append(opts, images.SynchronousDelete())
		}
		if err := e.client.ImageService().Delete(ctx, name, opts...); err != nil && !errdefs.IsNotFound(err) {
			return out, fmt.Errorf("remove image %s: %w", ref, err)
		}
		if named, err := reference.ParseNormalizedNamed(name); err == nil && named.Name() != dangling {
			out = append(out, image.DeleteResponse{Untagged: reference.FamiliarString(named)})
			e.imageEvent(events.ActionUnTag, n.id, reference.FamiliarString(named), n.config.Config.Labels)
		}
	}
	if len(wanted) == len(n.names) && len(users) == 0 {
		e.images.drop(n.imageInfo)
		out = append(out, image.DeleteResponse{Deleted: n.id})
		e.imageEvent(events.ActionDelete, n.id, n.id, n.config.Config.Labels)
	}
	return out, nil
}

// inUse refuses to take the last name of an image that containers use.
func inUse(ref, id string, users []saved, byName, force bool) error {
	for _, c := range users {
		running := isRunning(c)
		switch {
		case running && !byName:
			return model.Errorf(model.Conflict, "conflict: unable to delete %s (cannot be forced) - image is being used by running container %s", short(id), c.ID[:12])
		case running && !force, !force && byName:
			return model.Errorf(model.Conflict, "conflict: unable to remove repository reference %q (must force) - container %s is using its referenced image %s", ref, c.ID[:12], short(id))
		case !force:
			return model.Errorf(model.Conflict, "conflict: unable to delete %s (must be forced) - image is being used by stopped container %s", short(id), c.ID[:12])
		}
	}
	return nil
}

// PruneImages implements runtime.ImageEditor.
func (e *Engine) PruneImages(ctx context.Context, opts runtime.PruneOptions) ([]image.DeleteResponse, uint64, error) {
	ctx = e.ns(ctx)
	all, err := e.images.all(ctx)
	if err != nil {
		return nil, 0, err
	}
	users := e.imageUsers()
	var out []image.DeleteResponse
	var freed uint64
	for id, n := range all {
		created := time.Time{}
		if n.config.Created != nil {
			created = *n.config.Created
		}
		if len(users[id]) > 0 || !opts.All && len(n.tags) > 0 || !docker.Prunable(opts, created, n.config.Config.Labels) {
			continue
		}
		size := e.images.size(ctx, n.imageInfo)
		gone, err := e.RemoveImage(ctx, id, true)
		if err != nil {
			return out, freed, err
		}
		out = append(out, gone...)
		freed += uint64(max(0, size))
	}
	return out, freed, nil
}
