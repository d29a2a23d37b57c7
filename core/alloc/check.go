package alloc

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

// Check says what is wrong with the subnets that a network asks for, one line for each
// fault, as Docker does; nil when nothing is. The error is of kind Invalid.
func Check(spec *api.NetworkSpec) error {
	var faults []error
	var subnets []netip.Prefix
	for _, c := range spec.GetIpam().GetConfigs() {
		p, err := netip.ParsePrefix(c.GetSubnet())
		if err != nil {
			if c.GetSubnet() != "" || c.GetRange() != "" || c.GetGateway() != "" || len(c.GetReserved()) > 0 {
				faults = append(faults, fmt.Errorf("invalid subnet %s: invalid CIDR block notation", c.GetSubnet()))
			}
			continue
		}
		if p.Addr().Is6() && !spec.GetIpv6Enabled() {
			continue
		}
		if p != p.Masked() {
			faults = append(faults, fmt.Errorf("invalid subnet %s: it should be %s", p, p.Masked()))
		}
		for _, other := range subnets {
			if other.Overlaps(p) {
				faults = append(faults, fmt.Errorf("invalid subnet %s: it overlaps subnet %s of the same network", p, other))
			}
		}
		subnets = append(subnets, p)
		if p.Addr().Is4() && p.Bits() > 30 {
			faults = append(faults, fmt.Errorf("invalid subnet %s: it has no room for a gateway and a task", p))
		}
		faults = append(faults, checkRange(c.GetRange(), p), within("gateway", c.GetGateway(), p))
		for _, a := range c.GetReserved() {
			faults = append(faults, within("auxiliary address", a, p))
		}
	}
	if err := errors.Join(faults...); err != nil {
		return model.Errorf(model.Invalid, "invalid network config:\n%s", err)
	}
	return nil
}

// checkRange checks the part of a subnet that addresses are to come from.
func checkRange(text string, subnet netip.Prefix) error {
	if text == "" {
		return nil
	}
	r, err := netip.ParsePrefix(text)
	switch {
	case err != nil:
		return fmt.Errorf("invalid ip-range %s: invalid CIDR block notation", text)
	case r.Addr().Is4() != subnet.Addr().Is4():
		return fmt.Errorf("invalid ip-range %s: parent subnet is an %s block", r, familyName(subnet))
	case r.Bits() < subnet.Bits():
		return fmt.Errorf("invalid ip-range %s: CIDR block is bigger than its parent subnet %s", r, subnet)
	case r != r.Masked():
		return fmt.Errorf("invalid ip-range %s: it should be %s", r, r.Masked())
	case !subnet.Overlaps(r):
		return fmt.Errorf("invalid ip-range %s: parent subnet %s doesn't contain ip-range", r, subnet)
	default:
		return nil
	}
}

func within(what, text string, subnet netip.Prefix) error {
	if text == "" {
		return nil
	}
	a, err := netip.ParseAddr(text)
	switch {
	case err != nil:
		return fmt.Errorf("invalid %s %s: invalid address", what, text)
	case a.Is4() != subnet.Addr().Is4():
		return fmt.Errorf("invalid %s %s: parent subnet is an %s block", what, a, familyName(subnet))
	case !subnet.Contains(a):
		return fmt.Errorf("invalid %s %s: parent subnet %s doesn't contain this address", what, a, subnet)
	default:
		return nil
	}
}

func familyName(p netip.Prefix) string {
	if p.Addr().Is4() {
		return "IPv4"
	}
	return "IPv6"
}

// CheckVNIs says what is wrong with the VXLAN network identifiers that a network asks
// for; nil when nothing is. The error is of kind Invalid.
func CheckVNIs(spec *api.NetworkSpec) error {
	list, given := spec.GetDriverConfig().GetOptions()[vniOption]
	if !given {
		return nil
	}
	vnis := parseVNIs(list)
	seen := make(map[uint64]bool, len(vnis))
	for _, v := range vnis {
		if v < 1 || v > lastVNI || seen[v] {
			return model.Errorf(model.Invalid, "%s: %d is out of range or given twice: identifiers go from 1 to %d", vniOption, v, lastVNI)
		}
		seen[v] = true
	}
	if len(vnis) != strings.Count(list, ",")+1 {
		return model.Errorf(model.Invalid, "%s: %q is not a list of numbers separated by commas", vniOption, list)
	}
	return nil
}
