package dataplane

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/api/types/network"
	"google.golang.org/protobuf/proto"

	skepv1 "github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/platform/disk"
	"github.com/skep-dev/skep/worker/runtime"
)

// bridgeVNI is the first number of networks of this node alone. No VXLAN has it: it tells
// such a network's bridge in the switch from the others.
const bridgeVNI = 1 << 24

// plainMTU is that of links that nothing is wrapped around.
const plainMTU = 1500

// bridge is a network of this node alone, made by a person: a bridge in the switch without a
// VXLAN device. To names, links and rules it is like any network of the swarm.
type bridge struct {
	ID, Name  string
	Created   time.Time
	Subnet    netip.Prefix
	Gateway   netip.Addr
	Internal  bool              `json:",omitempty"`
	Labels    map[string]string `json:",omitempty"`
	Options   map[string]string `json:",omitempty"`
	Attach    bool              `json:",omitempty"` // what was asked for; any container may join
	VNI       uint32
	Last      netip.Addr            // handed out last: a freed address rests as long as possible
	Addresses map[string]netip.Addr // by container id
}

func isBridge(n *skepv1.OverlayNetwork) bool {
	return len(n.GetSubnets()) > 0 && n.GetSubnets()[0].GetVni() >= bridgeVNI
}

func (b *bridge) record() *skepv1.OverlayNetwork {
	n := &skepv1.OverlayNetwork{
		Id: b.ID, Name: b.Name, Internal: b.Internal,
		Subnets: []*skepv1.OverlaySubnet{{Subnet: b.Subnet.String(), Gateway: b.Gateway.String(), Vni: b.VNI}},
	}
	if mtu, err := strconv.ParseUint(b.Options[mtuOption], 10, 16); err == nil {
		n.Mtu = uint32(mtu)
	}
	return n
}

const mtuOption = "com.docker.network.driver.mtu"

// CreateBridge implements runtime.Bridges.
func (d *Dataplane) CreateBridge(_ context.Context, req network.CreateRequest) (string, error) {
	if err := checkBridge(&req); err != nil {
		return "", err
	}
	id := make([]byte, 32)
	if _, err := rand.Read(id); err != nil {
		return "", fmt.Errorf("choose id of network: %w", err)
	}
	b := &bridge{
		ID: hex.EncodeToString(id), Name: req.Name, Created: time.Now().UTC(), Internal: req.Internal, Attach: req.Attachable,
		Labels: req.Labels, Options: req.Options, Addresses: map[string]netip.Addr{},
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, other := range d.bridges {
		if other.Name == b.Name {
			return "", model.Errorf(model.Exists, "network with name %s already exists", b.Name)
		}
	}
	if err := d.addressBridge(b, req.IPAM); err != nil {
		return "", err
	}
	for b.VNI = bridgeVNI; slices.ContainsFunc(slices.Collect(maps.Values(d.bridges)), func(o *bridge) bool { return o.VNI == b.VNI }); {
		b.VNI++
	}
	d.bridges[b.ID] = b
	if err := d.saveBridges(); err != nil {
		delete(d.bridges, b.ID)
		return "", err
	}
	d.know(&skepv1.NetworkUpdate{Networks: []*skepv1.OverlayNetwork{b.record()}})
	return b.ID, nil
}

// checkBridge refuses what a network of one node cannot be.
func checkBridge(req *network.CreateRequest) error {
	refuse := func(what string) error {
		return model.Errorf(model.Unimplemented, "network %s: %s not implemented by skep for bridge networks", req.Name, what)
	}
	switch {
	case req.Name == "" || strings.ContainsAny(req.Name, " /"):
		return model.Errorf(model.Invalid, "invalid network name: %q", req.Name)
	case req.Ingress:
		return model.Errorf(model.Invalid, "ingress network can only be a swarm-scoped network")
	case req.ConfigOnly || req.ConfigFrom != nil && req.ConfigFrom.Network != "":
		return refuse("configurations (--config-only, --config-from) are")
	case req.EnableIPv6 != nil && *req.EnableIPv6:
		return refuse("IPv6 is")
	case req.EnableIPv4 != nil && !*req.EnableIPv4:
		return refuse("being without IPv4 is")
	}
	for _, key := range slices.Sorted(maps.Keys(req.Options)) {
		if key != mtuOption {
			return refuse("the option " + key + " is")
		}
	}
	if text, ok := req.Options[mtuOption]; ok {
		if n, err := strconv.ParseUint(text, 10, 16); err != nil || n < 68 {
			return model.Errorf(model.Invalid, "network %s: invalid MTU %q", req.Name, text)
		}
	}
	if req.IPAM == nil {
		return nil
	}
	switch {
	case req.IPAM.Driver != "" && req.IPAM.Driver != "default" || len(req.IPAM.Options) > 0:
		return refuse("address drivers and their options are")
	case len(req.IPAM.Config) > 1:
		return refuse("several subnets are")
	}
	for _, c := range req.IPAM.Config {
		if len(c.AuxAddress) > 0 || c.IPRange.IsValid() {
			return refuse("address ranges and reserved addresses are")
		}
	}
	return nil
}

// addressBridge gives a network its subnet and gateway. Callers hold mu.
func (d *Dataplane) addressBridge(b *bridge, ipam *network.IPAM) error {
	taken := []netip.Prefix{d.state.Address.Masked()}
	for _, other := range d.bridges {
		taken = append(taken, other.Subnet)
	}
	var want network.IPAMConfig
	if ipam != nil && len(ipam.Config) > 0 {
		want = ipam.Config[0]
	}
	if want.Subnet.IsValid() {
		b.Subnet = want.Subnet.Masked()
		if !b.Subnet.Addr().Is4() || b.Subnet.Bits() > 30 {
			return model.Errorf(model.Invalid, "invalid subnet %s: it must be IPv4 and have room for two addresses", want.Subnet)
		}
		if slices.ContainsFunc(taken, b.Subnet.Overlaps) {
			return model.Errorf(model.Denied, "invalid pool request: Pool overlaps with other one on this address space")
		}
	} else {
		free, err := freeNetwork(d.host, taken...)
		if err != nil {
			return err
		}
		b.Subnet = free.Masked()
	}
	if b.Gateway = want.Gateway; !b.Gateway.IsValid() {
		b.Gateway = b.Subnet.Addr().Next()
	}
	if !b.Subnet.Contains(b.Gateway) {
		return model.Errorf(model.Invalid, "invalid network config:\ninvalid gateway %s: parent subnet %s doesn't contain this address", b.Gateway, b.Subnet)
	}
	return nil
}

// RemoveBridge implements runtime.Bridges.
func (d *Dataplane) RemoveBridge(_ context.Context, id string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	b := d.bridges[id]
	if b == nil {
		return model.Errorf(model.NotFound, "network %s not found", id)
	}
	if users := slices.Sorted(maps.Keys(b.Addresses)); len(users) > 0 {
		return model.Errorf(model.Denied, "error while removing network: network %s has active endpoints (name:%q id:%q)",
			b.Name, strings.TrimPrefix(d.state.Leases[users[0]].Name, "/"), users[0][:min(12, len(users[0]))])
	}
	delete(d.bridges, id)
	if err := d.saveBridges(); err != nil {
		d.bridges[id] = b
		return err
	}
	d.know(&skepv1.NetworkUpdate{RemovedNetworks: []string{id}})
	return nil
}

// ListBridges implements runtime.Bridges.
func (d *Dataplane) ListBridges() []network.Network {
	d.mu.Lock()
	defer d.mu.Unlock()
	var out []network.Network
	for _, b := range d.bridges {
		n := network.Network{
			Name: b.Name, ID: b.ID, Created: b.Created, Scope: "local", Driver: "bridge", EnableIPv4: true, Internal: b.Internal, Attachable: b.Attach,
			IPAM:   network.IPAM{Driver: "default", Options: map[string]string{}, Config: []network.IPAMConfig{{Subnet: b.Subnet, Gateway: b.Gateway}}},
			Labels: maps.Clone(b.Labels), Options: maps.Clone(b.Options),
		}
		if n.Labels == nil {
			n.Labels = map[string]string{}
		}
		if n.Options == nil {
			n.Options = map[string]string{}
		}
		out = append(out, n)
	}
	slices.SortFunc(out, func(a, b network.Network) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

// Bridge implements runtime.Bridges.
func (d *Dataplane) Bridge(o runtime.OverlayRequest) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.bridgeOf(o) != nil
}

// bridgeOf returns the network of this node that a request means, or nil. Callers hold mu.
func (d *Dataplane) bridgeOf(o runtime.OverlayRequest) *bridge {
	for _, named := range []string{o.NetworkID, o.Name} {
		if b := d.bridges[named]; b != nil {
			return b
		}
		for _, b := range d.bridges {
			if named != "" && b.Name == named {
				return b
			}
		}
	}
	return nil
}

// placeBridges gives a container its addresses in networks of this node. Callers hold mu.
func (d *Dataplane) placeBridges(containerID string, overlays []runtime.OverlayRequest) ([]runtime.OverlayRequest, error) {
	if len(d.bridges) == 0 {
		return overlays, nil
	}
	out, changed := slices.Clone(overlays), false
	for i, o := range out {
		b := d.bridgeOf(o)
		if b == nil {
			continue
		}
		addr, held := b.Addresses[containerID]
		if !held {
			var err error
			if addr, err = b.allocate(o.Wanted); err != nil {
				return out, err
			}
			b.Addresses[containerID], changed = addr, true
		}
		out[i].NetworkID, out[i].Name, out[i].Address = b.ID, b.Name, netip.PrefixFrom(addr, b.Subnet.Bits())
	}
	if !changed {
		return out, nil
	}
	return out, d.saveBridges()
}

// takePlaces gives a container its addresses in networks of this node, and waits for those
// of the swarm.
func (d *Dataplane) takePlaces(ctx context.Context, req *runtime.SandboxRequest) error {
	d.mu.Lock()
	var err error
	req.Overlays, err = d.placeBridges(req.ContainerID, req.Overlays)
	d.mu.Unlock()
	if err == nil {
		err = d.awaitNetworks(ctx, req.Overlays)
	}
	if err == nil {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	had := d.state.Leases[req.ContainerID].Overlays
	fresh := slices.DeleteFunc(slices.Clone(req.Overlays), func(o runtime.OverlayRequest) bool {
		return slices.ContainsFunc(had, func(h runtime.OverlayRequest) bool { return h.NetworkID == o.NetworkID })
	})
	return errors.Join(err, d.retract(req.ContainerID, fresh))
}

// allocate returns a free address, or the one asked for.
func (b *bridge) allocate(wanted []netip.Addr) (netip.Addr, error) {
	used := map[netip.Addr]bool{b.Gateway: true, b.Subnet.Addr(): true, broadcast(b.Subnet): true}
	for _, a := range b.Addresses {
		used[a] = true
	}
	if len(wanted) > 0 {
		a := wanted[0]
		switch {
		case !a.Is4() || len(wanted) > 1:
			return a, model.Errorf(model.Unimplemented, "network %s: IPv6 of bridge networks is not implemented by skep", b.Name)
		case !b.Subnet.Contains(a):
			return a, model.Errorf(model.Invalid, "invalid config for network %s: invalid endpoint settings: no configured subnet contains IP address %s", b.Name, a)
		case used[a]:
			return a, model.Errorf(model.Denied, "Address already in use: %s in network %s", a, b.Name)
		}
		return a, nil
	}
	at, ok := nextFree(b.Subnet, b.Last, used)
	if ok {
		b.Last = at
		return at, nil
	}
	return at, model.Errorf(model.Exhausted, "no address is free in network %s (%s): make one with a larger --subnet", b.Name, b.Subnet)
}

// announce makes a container known to its neighbours in networks of this node. Callers hold mu.
func (d *Dataplane) announce(id string, l lease) {
	u := new(skepv1.NetworkUpdate)
	for _, o := range l.Overlays {
		if d.bridges[o.NetworkID] != nil {
			u.Endpoints = append(u.Endpoints, d.bridgeEndpoint(id, l, o))
		}
	}
	if len(u.Endpoints) > 0 {
		d.know(u)
	}
}

func (d *Dataplane) bridgeEndpoint(id string, l lease, o runtime.OverlayRequest) *skepv1.OverlayEndpoint {
	return &skepv1.OverlayEndpoint{
		Key: &skepv1.EndpointKey{NetworkId: o.NetworkID, TaskId: id}, Name: strings.TrimPrefix(l.Name, "/"), NodeId: d.want.Node().GetId(),
		Addresses: []string{o.Address.String()}, Aliases: o.Aliases, Routable: true,
	}
}

// retract takes back what announce told, and frees the addresses. Callers hold mu.
func (d *Dataplane) retract(id string, overlays []runtime.OverlayRequest) error {
	u, changed := new(skepv1.NetworkUpdate), false
	for _, o := range overlays {
		b := d.bridges[o.NetworkID]
		if b == nil {
			continue
		}
		u.RemovedEndpoints = append(u.RemovedEndpoints, &skepv1.EndpointKey{NetworkId: o.NetworkID, TaskId: id})
		if _, held := b.Addresses[id]; held {
			delete(b.Addresses, id)
			changed = true
		}
	}
	if len(u.GetRemovedEndpoints()) > 0 {
		d.know(u)
	}
	if !changed {
		return nil
	}
	return d.saveBridges()
}

// know merges what only this node knows. Callers hold mu.
func (d *Dataplane) know(u *skepv1.NetworkUpdate) {
	u.Version = d.want.Version()
	d.names.merge(d.want.Merge(u))
}

// withBridges adds to a complete update of the managers what only this node knows, which
// they do not list. Callers hold mu.
func (d *Dataplane) withBridges(u *skepv1.NetworkUpdate) *skepv1.NetworkUpdate {
	if !u.GetComplete() || len(d.bridges) == 0 {
		return u
	}
	u = proto.CloneOf(u)
	for _, id := range sortedKeys(d.bridges) {
		u.Networks = append(u.Networks, d.bridges[id].record())
	}
	for _, id := range sortedKeys(d.state.Leases) {
		l := d.state.Leases[id]
		for _, o := range l.Overlays {
			if d.bridges[o.NetworkID] != nil {
				u.Endpoints = append(u.Endpoints, d.bridgeEndpoint(id, l, o))
			}
		}
	}
	return u
}

// withoutBridges takes that away again from what is known.
func withoutBridges(u *skepv1.NetworkUpdate) *skepv1.NetworkUpdate {
	own := map[string]bool{}
	for _, n := range u.GetNetworks() {
		own[n.GetId()] = isBridge(n)
	}
	u.Networks = slices.DeleteFunc(u.Networks, isBridge)
	u.Endpoints = slices.DeleteFunc(u.Endpoints, func(e *skepv1.OverlayEndpoint) bool { return own[e.GetKey().GetNetworkId()] })
	return u
}

// ensureBridgeNetwork makes or mends the bridge of a network of this node. Callers hold mu.
func (d *Dataplane) ensureBridgeNetwork(f *fabric, n *skepv1.OverlayNetwork, x *drift) error {
	vni := n.GetSubnets()[0].GetVni()
	link, err := f.ensureBridge(vni, insideMTU(n, 0), x, "network "+n.GetName())
	if err != nil || link == nil {
		return err
	}
	f.links[vni] = segmentLinks{bridge: link.Attrs().Index}
	return nil
}

func (d *Dataplane) bridgesPath() string { return d.path() + ".networks" }

// saveBridges writes the networks of this node. Callers hold mu.
func (d *Dataplane) saveBridges() error {
	data, err := json.Marshal(d.bridges)
	if err != nil {
		return fmt.Errorf("write networks: %w", err)
	}
	return disk.WriteFile(d.bridgesPath(), data, 0o600)
}

// loadBridges reads them, and forgets what no container holds any more. Callers hold mu.
func (d *Dataplane) loadBridges() error {
	d.bridges = map[string]*bridge{}
	data, err := os.ReadFile(d.bridgesPath())
	if err == nil {
		err = json.Unmarshal(data, &d.bridges)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("read networks: %w", err)
	}
	for _, b := range d.bridges {
		if b.Addresses == nil {
			b.Addresses = map[string]netip.Addr{}
		}
		maps.DeleteFunc(b.Addresses, func(id string, _ netip.Addr) bool { _, leased := d.state.Leases[id]; return !leased })
		d.know(&skepv1.NetworkUpdate{Networks: []*skepv1.OverlayNetwork{b.record()}})
	}
	for id, l := range d.state.Leases {
		d.announce(id, l)
	}
	return nil
}
