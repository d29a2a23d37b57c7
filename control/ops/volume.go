package ops

import (
	"context"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

func noVolumes() error {
	return fail(model.Errorf(model.Unimplemented, "cluster volumes are not implemented by skep"))
}

// CreateVolume refuses: there are no cluster volumes.
func (o *Ops) CreateVolume(context.Context, *api.CreateVolumeRequest) (*api.CreateVolumeResponse, error) {
	return nil, noVolumes()
}

// UpdateVolume refuses: there are no cluster volumes.
func (o *Ops) UpdateVolume(context.Context, *api.UpdateVolumeRequest) (*api.UpdateVolumeResponse, error) {
	return nil, noVolumes()
}

// GetVolume finds nothing: there are no cluster volumes.
func (o *Ops) GetVolume(_ context.Context, req *api.GetVolumeRequest) (*api.GetVolumeResponse, error) {
	return nil, fail(notFound("volume", req.GetVolumeId()))
}

// ListVolumes returns an empty list: there are no cluster volumes.
func (o *Ops) ListVolumes(context.Context, *api.ListVolumesRequest) (*api.ListVolumesResponse, error) {
	return new(api.ListVolumesResponse), nil
}

// RemoveVolume finds nothing: there are no cluster volumes.
func (o *Ops) RemoveVolume(_ context.Context, req *api.RemoveVolumeRequest) (*api.RemoveVolumeResponse, error) {
	return nil, fail(notFound("volume", req.GetVolumeId()))
}
