package convert

import (
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/moby/moby/api/types/swarm"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

func invalid(format string, args ...any) error { return model.Errorf(model.Invalid, format, args...) }

// enum looks a Docker word up in an enum's values; empty is the zero value.
func enum[E ~int32](values map[string]int32, word, what string) (E, error) {
	if word == "" {
		return 0, nil
	}
	v, ok := values[strings.ToUpper(strings.ReplaceAll(word, "-", "_"))]
	if !ok {
		return 0, invalid("invalid %s: %q", what, word)
	}
	return E(v), nil
}

// word returns the Docker word of an enum value: "stop-first".
func word(e interface{ String() string }) string {
	return strings.ReplaceAll(strings.ToLower(e.String()), "_", "-")
}

func meta(m *api.Meta) swarm.Meta {
	return swarm.Meta{
		Version:   swarm.Version{Index: m.GetVersion().GetIndex()},
		CreatedAt: instant(m.GetCreatedAt()),
		UpdatedAt: instant(m.GetUpdatedAt()),
	}
}

// instant returns the zero time for nil, not 1970.
func instant(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.AsTime()
}

func optionalInstant(t *timestamppb.Timestamp) *time.Time {
	if t == nil {
		return nil
	}
	at := t.AsTime()
	return &at
}

func optionalDuration(d *durationpb.Duration) *time.Duration {
	if d == nil {
		return nil
	}
	v := d.AsDuration()
	return &v
}

func storeOptionalDuration(d *time.Duration) *durationpb.Duration {
	if d == nil {
		return nil
	}
	return durationpb.New(*d)
}

func storeAnnotations(a swarm.Annotations) *api.Annotations {
	return &api.Annotations{Name: a.Name, Labels: maps.Clone(a.Labels)}
}

// dockerAnnotations never returns nil labels: clients read them without looking.
func dockerAnnotations(a *api.Annotations) swarm.Annotations {
	labels := maps.Clone(a.GetLabels())
	if labels == nil {
		labels = make(map[string]string)
	}
	return swarm.Annotations{Name: a.GetName(), Labels: labels}
}

func storeDriver(d *swarm.Driver) *api.Driver {
	if d == nil {
		return nil
	}
	return &api.Driver{Name: d.Name, Options: maps.Clone(d.Options)}
}

func dockerDriver(d *api.Driver) *swarm.Driver {
	if d == nil {
		return nil
	}
	return &swarm.Driver{Name: d.GetName(), Options: maps.Clone(d.GetOptions())}
}

// each converts a list and keeps nil nil.
func each[A, B any](list []A, convert func(A) B) []B {
	if list == nil {
		return nil
	}
	out := make([]B, 0, len(list))
	for _, a := range list {
		out = append(out, convert(a))
	}
	return out
}

// present drops the nulls that JSON may have in a list of pointers.
func present[A any](list []*A) []*A {
	return slices.DeleteFunc(slices.Clone(list), func(a *A) bool { return a == nil })
}

// tryEach is each with a conversion that can fail.
func tryEach[A, B any](list []A, convert func(A) (B, error)) ([]B, error) {
	if list == nil {
		return nil, nil
	}
	out := make([]B, 0, len(list))
	for _, a := range list {
		b, err := convert(a)
		if err != nil {
			return nil, err
		}
		out = append(out, b)
	}
	return out, nil
}

// prefix reads an address in CIDR form; a bare address gets its full length. The zero
// Prefix, which clients do not see, stands for anything else.
func prefix(s string) netip.Prefix {
	if p, err := netip.ParsePrefix(s); err == nil {
		return p
	}
	if a, err := netip.ParseAddr(s); err == nil {
		return netip.PrefixFrom(a, a.BitLen())
	}
	return netip.Prefix{}
}

// addr reads an address, with or without prefix length.
func addr(s string) netip.Addr { return prefix(s).Addr() }

func clone(list []string) []string { return slices.Clone(list) }
