package cli

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/client"

	"github.com/skep-dev/skep/edge/cli/compose"
)

// networks makes the stack's networks that are not there yet.
func (p *deployment) networks(ctx context.Context) error {
	for _, n := range p.stack.Networks {
		name := n.Spec.Name
		have, err := p.d.NetworkInspect(ctx, name, client.NetworkInspectOptions{})
		switch {
		case errdefs.IsNotFound(err) && n.External:
			return fmt.Errorf("network %s is declared external but does not exist: make it with `docker network create --driver overlay %s`", name, name)
		case errdefs.IsNotFound(err):
			_, err := p.d.NetworkCreate(ctx, name, client.NetworkCreateOptions{
				Driver: n.Spec.Driver, Options: n.Spec.Options, Labels: n.Spec.Labels, IPAM: n.Spec.IPAM, Attachable: n.Spec.Attachable,
				Internal: n.Spec.Internal, EnableIPv4: n.Spec.EnableIPv4, EnableIPv6: n.Spec.EnableIPv6,
			})
			if err != nil {
				return fmt.Errorf("create network %s: %w", name, err)
			}
			p.say("created network %s", name)
		case err != nil:
			return fmt.Errorf("find network %s: %w", name, err)
		case n.External && have.Network.Scope != "swarm":
			return fmt.Errorf("network %s exists on this node only: services need one with scope swarm", name)
		case !n.External && have.Network.Labels[compose.LabelNamespace] != p.stack.Name:
			return fmt.Errorf("network %s exists and is not of the stack %s: say `external: true`, or choose another name", name, p.stack.Name)
		}
	}
	return nil
}
