package containerd

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"strings"

	ctd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images/archive"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/events"
	"github.com/opencontainers/go-digest"

	"github.com/skep-dev/skep/core/model"
)

// Load implements runtime.Images.
func (e *Engine) Load(ctx context.Context, r io.Reader) ([]string, error) {
	ctx = e.ns(ctx)
	in, err := compression.DecompressStream(r)
	if err != nil {
		return nil, model.Errorf(model.Invalid, "read image archive: %w", err)
	}
	defer func() { _ = in.Close() }() // only read from
	// A tar block begins with a name; anything shorter is no archive.
	head := make([]byte, 512)
	if n, err := io.ReadFull(in, head); err != nil {
		return nil, model.Errorf(model.Invalid, "unrecognized image format: %d bytes: %w", n, err)
	}
	ctx, done, err := e.client.WithLease(ctx)
	if err != nil {
		return nil, fmt.Errorf("load images: %w", err)
	}
	defer func() { _ = done(context.WithoutCancel(ctx)) }() // leases expire by themselves
	before, err := e.client.ImageService().List(ctx)
	if err != nil {
		return nil, fmt.Errorf("load images: %w", err)
	}
	imported, err := e.client.Import(ctx, io.MultiReader(bytes.NewReader(head), in),
		ctd.WithImageRefTranslator(translate),
		ctd.WithDigestRef(func(d digest.Digest) string { return dangling + "@" + d.String() }),
		ctd.WithSkipDigestRef(func(name string) bool { return name != "" }),
		ctd.WithImportPlatform(platforms.Default()))
	if err != nil {
		return nil, model.Errorf(model.Invalid, "load images: %w", err)
	}
	for _, old := range before {
		for _, img := range imported {
			if img.Name == old.Name && img.Target.Digest != old.Target.Digest {
				if err := e.images.hang(ctx, old.Target, old.Name); err != nil {
					return nil, err
				}
			}
		}
	}
	var refs []string
	for _, img := range imported {
		if err := ctd.NewImageWithPlatform(e.client, img, platforms.Default()).Unpack(ctx, snapshotter); err != nil {
			return refs, fmt.Errorf("unpack %s: %w", img.Name, err)
		}
		i, err := e.images.info(ctx, img.Target)
		if err != nil {
			return refs, fmt.Errorf("load %s: %w", img.Name, err)
		}
		name := i.id
		if named, err := reference.ParseNormalizedNamed(img.Name); err == nil && named.Name() != dangling {
			name = reference.FamiliarString(named)
			if err := e.images.unhang(ctx, img.Target); err != nil {
				return refs, err
			}
		}
		refs = append(refs, name)
		e.imageEvent(events.ActionLoad, i.id, name, i.config.Config.Labels)
	}
	if len(refs) == 0 {
		return nil, model.Errorf(model.Invalid, "archive holds no image for %s", platforms.DefaultString())
	}
	return refs, nil
}

// translate makes the name that an archive gives an image canonical; names that are none
// are dropped.
func translate(name string) string {
	named, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return ""
	}
	return reference.TagNameOnly(named).String()
}

// Save implements runtime.Images.
func (e *Engine) Save(ctx context.Context, refs []string, w io.Writer) error {
	ctx = e.ns(ctx)
	opts := []archive.ExportOpt{archive.WithPlatform(platforms.Default())}
	for _, ref := range refs {
		n, err := e.images.named(ctx, ref)
		if err != nil {
			return err
		}
		var names []string
		if named, err := reference.ParseDockerRef(ref); err == nil && !strings.HasPrefix(n.id, "sha256:"+strings.TrimPrefix(ref, "sha256:")) {
			if _, ok := named.(reference.NamedTagged); ok {
				names = []string{named.String()}
			}
		}
		target, err := e.pushable(ctx, n.target)
		if err != nil {
			return err
		}
		opts = append(opts, archive.WithManifest(target, names...))
	}
	if err := e.client.Export(ctx, w, opts...); err != nil {
		return fmt.Errorf("save images: %w", err)
	}
	return nil
}
