package model

// MeshSourceLabel says whose address tasks see at ports of the routing mesh: on a service,
// for its own; on the ingress network, for services without it. As an engine label it tells
// whether the node can answer clients by their own addresses.
const MeshSourceLabel = "skep.mesh.source"

// The values of MeshSourceLabel: the client's address, or the entry node's.
const (
	MeshSourceKeep       = "keep"
	MeshSourceMasquerade = "masquerade"
)

// CheckMeshSource refuses labels with another value of MeshSourceLabel.
func CheckMeshSource(labels map[string]string) error {
	v, ok := labels[MeshSourceLabel]
	if !ok || v == MeshSourceKeep || v == MeshSourceMasquerade {
		return nil
	}
	return Errorf(Invalid, "label %s=%q: must be %s (tasks see the client's address at published ports) or %s (they see the entry node's)",
		MeshSourceLabel, v, MeshSourceKeep, MeshSourceMasquerade)
}
