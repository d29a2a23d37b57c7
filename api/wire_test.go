package api_test

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	_ "github.com/skep-dev/skep/api"
	_ "github.com/skep-dev/skep/api/networkdb"
	"github.com/skep-dev/skep/api/skepv1"
)

var update = flag.Bool("update", false, "rewrite testdata/wire.txt; a changed number breaks the swarm's wire and disk formats")

// TestWire holds every message, field number, enum value and method of all packages
// against the committed list. A difference is a change of the wire and disk formats.
func TestWire(t *testing.T) {
	got := strings.Join(wireLines(), "\n") + "\n"
	const file = "testdata/wire.txt"
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(want, []byte(got)) {
		t.Errorf("wire format changed (-committed +generated):\n%s", cmp.Diff(string(want), got))
	}
}

// TestEveryMethodDeclaresAccess walks the descriptors: a method without a rule would be
// refused by the interceptor, so it must not exist.
func TestEveryMethodDeclaresAccess(t *testing.T) {
	methods := 0
	forEachFile(func(f protoreflect.FileDescriptor) {
		for i := range f.Services().Len() {
			s := f.Services().Get(i)
			for j := range s.Methods().Len() {
				m := s.Methods().Get(j)
				methods++
				rule, ok := proto.GetExtension(m.Options(), skepv1.E_Access).(*skepv1.Access)
				if !ok || rule == nil || (len(rule.GetRoles()) == 0) == !rule.GetAnyone() {
					t.Errorf("%s declares no access rule, or both roles and anyone", m.FullName())
				}
				for _, role := range rule.GetRoles() {
					if role != "swarm-manager" && role != "swarm-worker" {
						t.Errorf("%s: unknown role %q", m.FullName(), role)
					}
				}
			}
		}
	})
	if methods < 65 {
		t.Errorf("found %d methods, SwarmKit alone has 65", methods)
	}
}

func forEachFile(visit func(protoreflect.FileDescriptor)) {
	protoregistry.GlobalFiles.RangeFiles(func(f protoreflect.FileDescriptor) bool {
		if p := f.Package(); p == "docker.swarmkit.v1" || p == "skep.v1" || strings.HasPrefix(f.Path(), "docker/networkdb/") {
			visit(f)
		}
		return true
	})
}

func wireLines() []string {
	var lines []string
	add := func(format string, args ...any) { lines = append(lines, fmt.Sprintf(format, args...)) }
	var message func(m protoreflect.MessageDescriptor)
	enum := func(e protoreflect.EnumDescriptor) {
		for i := range e.Values().Len() {
			v := e.Values().Get(i)
			add("enum %s %s = %d", e.FullName(), v.Name(), v.Number())
		}
	}
	message = func(m protoreflect.MessageDescriptor) {
		if m.IsMapEntry() {
			return
		}
		add("message %s", m.FullName())
		for i := range m.Fields().Len() {
			add("field %s %s", m.FullName(), fieldLine(m.Fields().Get(i)))
		}
		for i := range m.Messages().Len() {
			message(m.Messages().Get(i))
		}
		for i := range m.Enums().Len() {
			enum(m.Enums().Get(i))
		}
	}
	forEachFile(func(f protoreflect.FileDescriptor) {
		for i := range f.Messages().Len() {
			message(f.Messages().Get(i))
		}
		for i := range f.Enums().Len() {
			enum(f.Enums().Get(i))
		}
		for i := range f.Services().Len() {
			s := f.Services().Get(i)
			for j := range s.Methods().Len() {
				m := s.Methods().Get(j)
				add("method /%s/%s %s%s -> %s%s", s.FullName(), m.Name(),
					stream(m.IsStreamingClient()), m.Input().FullName(), stream(m.IsStreamingServer()), m.Output().FullName())
			}
		}
	})
	slices.Sort(lines)
	return lines
}

func stream(is bool) string {
	if is {
		return "stream "
	}
	return ""
}

func fieldLine(f protoreflect.FieldDescriptor) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d %s ", f.Number(), f.Name())
	switch {
	case f.IsMap():
		fmt.Fprintf(&b, "map<%s,%s>", f.MapKey().Kind(), typeName(f.MapValue()))
	case f.IsList():
		fmt.Fprintf(&b, "repeated %s", typeName(f))
		if scalar := f.Message() == nil && f.Kind() != protoreflect.StringKind && f.Kind() != protoreflect.BytesKind; scalar && !f.IsPacked() {
			b.WriteString(" unpacked")
		}
	default:
		b.WriteString(typeName(f))
	}
	if o := f.ContainingOneof(); o != nil {
		fmt.Fprintf(&b, " oneof %s", o.Name())
	}
	return b.String()
}

func typeName(f protoreflect.FieldDescriptor) string {
	switch {
	case f.Message() != nil:
		return string(f.Message().FullName())
	case f.Enum() != nil:
		return string(f.Enum().FullName())
	default:
		return f.Kind().String()
	}
}
