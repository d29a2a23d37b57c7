package agent

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"log/slog"
	"os"
	"strings"
	"time"

	"github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/registry"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime"
)

// Puller is the part of an engine that gets images.
type Puller interface {
	Pull(ctx context.Context, ref, platform string, auth *registry.AuthConfig, progress func(runtime.Progress)) error
	InspectImage(ctx context.Context, ref string) (*image.InspectResponse, error)
}

// offlinePull bounds the attempt to refresh an image that is here already.
const offlinePull = 15 * time.Second

// pull makes a task's image available. A reference with digest is fetched only if it is
// not here. A tag is looked up each time, and the local image serves if that fails; if
// there is none, the failure of the pull is the error.
func pull(ctx context.Context, engine Puller, spec *api.ContainerSpec, log *slog.Logger) error {
	ref := spec.GetImage()
	_, localErr := engine.InspectImage(ctx, ref)
	if localErr != nil && model.KindOf(localErr) != model.NotFound {
		return localErr
	}
	local := localErr == nil
	if local && strings.Contains(ref, "@") {
		return nil
	}
	auth := decodeAuth(spec.GetPullOptions().GetRegistryAuth())
	if !local {
		err := engine.Pull(ctx, ref, "", auth, nil)
		if err == nil || ctx.Err() != nil {
			return err
		}
		// Final, whatever it was: the next task of the slot tries again, as the restart policy
		// says, and an update sees that this one failed.
		return &model.Error{Kind: model.Internal, Text: "pull image " + ref + ": " + err.Error()}
	}
	ctx, cancel := context.WithTimeout(ctx, offlinePull)
	defer cancel()
	if err := engine.Pull(ctx, ref, "", auth, nil); err != nil {
		log.Debug("image not refreshed, the local one serves", slog.String("image", ref), slog.Any("error", err))
	}
	return nil
}

// decodeAuth reads a registry credential; what cannot be read means anonymous.
func decodeAuth(text string) *registry.AuthConfig {
	if text == "" {
		return nil
	}
	data, err := base64.URLEncoding.DecodeString(text)
	if err != nil {
		if data, err = base64.StdEncoding.DecodeString(text); err != nil {
			return nil
		}
	}
	auth := new(registry.AuthConfig)
	if json.Unmarshal(data, auth) != nil {
		return nil
	}
	return auth
}

// fileMode turns Go's file mode bits, as the wire has them, into an [os.FileMode].
func fileMode(bits uint32) os.FileMode { return os.FileMode(bits) }
